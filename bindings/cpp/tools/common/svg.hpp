/// Pictures as text: the few shapes of SVG that the tools draw with. Coordinates are pixels from the top left corner.

#pragma once

#include <string>

namespace svg {

enum class Anchor { start, middle, end };

class Picture {
 public:
  Picture(double width, double height);

  void line(double x1, double y1, double x2, double y2, const std::string& colour, double width = 1, const std::string& dashes = {});
  void rectangle(double x, double y, double width, double height, const std::string& fill, const std::string& stroke = "none");
  void circle(double x, double y, double radius, const std::string& fill);
  /// A closed shape, or with `closed` false a line through its points; `points`: "x,y x,y ...".
  void polygon(const std::string& points, const std::string& fill, const std::string& stroke, bool closed = true);
  /// `turned`: reads from the bottom to the top.
  void text(double x, double y, const std::string& words, double size = 13, Anchor anchor = Anchor::start,
            const std::string& colour = "#222", bool turned = false, bool bold = false);

  /// The whole file.
  [[nodiscard]] std::string finish() const;

 private:
  std::string body_;
};

}  // namespace svg
