#include "svg.hpp"

#include "program.hpp"

namespace svg {
namespace {

std::string escaped(const std::string& words) {
  std::string text;
  for (const char c : words) {
    switch (c) {
      case '&': text += "&amp;"; break;
      case '<': text += "&lt;"; break;
      case '>': text += "&gt;"; break;
      case '"': text += "&quot;"; break;
      default: text += c;
    }
  }
  return text;
}

const char* word(Anchor anchor) {
  return anchor == Anchor::start ? "start" : anchor == Anchor::middle ? "middle" : "end";
}

}  // namespace

Picture::Picture(double width, double height) {
  body_ = program::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%g\" height=\"%g\" viewBox=\"0 0 %g %g\" "
      "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n",
      width, height, width, height);
  rectangle(0, 0, width, height, "#fff");
}

void Picture::line(double x1, double y1, double x2, double y2, const std::string& colour, double width, const std::string& dashes) {
  body_ += program::format("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"%s\" stroke-width=\"%g\"", x1, y1, x2, y2,
                           colour.c_str(), width);
  if (!dashes.empty()) body_ += " stroke-dasharray=\"" + dashes + "\"";
  body_ += "/>\n";
}

void Picture::rectangle(double x, double y, double width, double height, const std::string& fill, const std::string& stroke) {
  body_ += program::format("<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"%s\" stroke=\"%s\"/>\n", x, y, width,
                           height, fill.c_str(), stroke.c_str());
}

void Picture::circle(double x, double y, double radius, const std::string& fill) {
  body_ += program::format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" fill=\"%s\"/>\n", x, y, radius, fill.c_str());
}

void Picture::polygon(const std::string& points, const std::string& fill, const std::string& stroke, bool closed) {
  body_ += program::format("<%s points=\"%s\" fill=\"%s\" stroke=\"%s\" stroke-width=\"2\" stroke-linejoin=\"round\"/>\n",
                           closed ? "polygon" : "polyline", points.c_str(), fill.c_str(), stroke.c_str());
}

void Picture::text(double x, double y, const std::string& words, double size, Anchor anchor, const std::string& colour, bool turned,
                   bool bold) {
  body_ += program::format("<text x=\"%.1f\" y=\"%.1f\" font-size=\"%g\" text-anchor=\"%s\" fill=\"%s\"", x, y, size, word(anchor),
                           colour.c_str());
  if (turned) body_ += program::format(" transform=\"rotate(-90 %.1f %.1f)\"", x, y);
  if (bold) body_ += " font-weight=\"bold\"";
  body_ += ">" + escaped(words) + "</text>\n";
}

std::string Picture::finish() const { return body_ + "</svg>\n"; }

}  // namespace svg
