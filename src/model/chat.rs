//! A conversation as the text that a model was trained on, by the checkpoint's own template.
//!
//! Chat templates are Jinja programs that Hugging Face runs with Jinja2, with a few additions. Here minijinja runs them,
//! set up to give the same text: `trim_blocks` and `lstrip_blocks`, Python's string methods, Python's spelling of
//! `None`, `True`, lists and dictionaries, `json.dumps` in the place of Jinja's escaping `tojson`, `raise_exception`,
//! `strftime_now`, `break` and `continue`, and the `generation` tag (which marks text for training and shows nothing).
//!
//! A template comes out of a downloaded file and is a program. It has no access to anything but its input; its steps,
//! its recursion and its output are bounded. What it makes in between is bounded only in number: a template that was
//! written to do so can still use up memory by doubling a string, so load checkpoints from people you trust with that.

use std::fmt::Write as _;
use std::io;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, Output, State, Value};
use serde::{Deserialize, Serialize};

use super::tokenizer::Tokenizer;
use crate::{Error, ErrorCode, Result};

/// Longest template source; those in use have up to 30 KB.
const MAX_SOURCE: usize = 1 << 20;
/// Steps of the template machine: a conversation of thousands of messages takes a hundredth of it, and it is used up
/// within seconds.
const FUEL: u64 = 10_000_000;
/// Calls and blocks within each other.
const MAX_DEPTH: usize = 100;
/// Longest output, apart from what the messages bring.
const MAX_OUTPUT: usize = 16 << 20;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template. Immutable; may be used from many threads.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`; `bos` and `eos` are the texts of the tokens of that name, empty where there is none.
    pub fn new(source: &str, bos: impl Into<String>, eos: impl Into<String>) -> Result<ChatTemplate> {
        if source.len() > MAX_SOURCE {
            return Err(Error::new(
                ErrorCode::InvalidFormat,
                format!("the chat template has {} bytes; expected at most {MAX_SOURCE}", source.len()),
            ));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_DEPTH);
        environment.set_formatter(format_as_python);
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|error| {
            Error::new(ErrorCode::InvalidFormat, format!("the chat template: {}", one_line(&error)))
        })?;
        Ok(ChatTemplate { environment, bos: bos.into(), eos: eos.into() })
    }

    /// Compiles the checkpoint's template: the one named `default`, or the only one.
    pub fn of(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        let templates = tokenizer.chat_templates();
        let template = templates.iter().find(|template| template.name == "default").or(match templates {
            [only] => Some(only),
            _ => None,
        });
        let Some(template) = template else {
            let names: Vec<_> = templates.iter().map(|template| template.name.as_str()).collect();
            return Err(Error::unsupported(match names.is_empty() {
                true => format!(
                    "{}: this checkpoint has no chat template; give the model plain text, or a template of your own",
                    tokenizer.file().display()
                ),
                false => format!(
                    "{}: no chat template is named \"default\"; there are {}",
                    tokenizer.file().display(),
                    names.join(", ")
                ),
            }));
        };
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
        ChatTemplate::new(&template.source, text(tokenizer.bos()), text(tokenizer.eos()))
            .map_err(|error| error.within(tokenizer.file().display()))
    }

    /// The text of a conversation; where `add_generation_prompt`, with the beginning of the answer to come.
    ///
    /// Encode it with `parse_special` and without `add_special`: templates write control tokens out, BOS among them.
    /// What is written in a message is then read as control tokens too, as everywhere with such templates.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let length: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let mut out = Bounded { bytes: Vec::new(), limit: length.saturating_mul(8).saturating_add(MAX_OUTPUT) };
        let context = minijinja::context! {
            messages => messages,
            tools => Value::from(()),
            documents => Value::from(()),
            add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        template.render_captured_to(context, &mut out).map_err(template_error)?;
        String::from_utf8(out.bytes)
            .map_err(|_| Error::new(ErrorCode::Internal, "the chat template machine wrote text that is not UTF-8"))
    }
}

/// An output that refuses to grow without end.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            return Err(io::Error::other(format!("the output is longer than {} bytes", self.limit)));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The message of `raise_exception`: what the template has against the conversation.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> std::result::Result<Value, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// A conversation that the template refuses is the caller's; everything else is the template's.
fn template_error(error: JinjaError) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(Raised(message)) = current.downcast_ref() {
            return Error::invalid_argument(format!("the chat template refuses the messages: {message}"));
        }
        cause = current.source();
    }
    let message = match error.kind() {
        ErrorKind::OutOfFuel => format!("stopped after {FUEL} steps"),
        _ => one_line(&error),
    };
    Error::new(ErrorCode::InvalidFormat, format!("the chat template: {message}"))
}

/// The error with its causes, on one line.
fn one_line(error: &JinjaError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(current) = cause {
        let _ = write!(text, ": {current}");
        cause = current.source();
    }
    text.replace('\n', " ")
}

/// `{% generation %}` marks what an assistant said, for training; minijinja does not know it. A block that is always
/// rendered does the same, and keeps what the signs around say about white space.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        rest = tag;
        let inner = tag.strip_prefix(['-', '+']).unwrap_or(tag);
        let Some(end) = inner.find("%}") else { break };
        let word = inner[..end].trim_end_matches(['-', '+']).trim();
        let replacement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => continue,
        };
        let end = tag.len() - inner.len() + end + 2;
        out.push_str(&tag[..end].replacen(word, replacement, 1));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// Python's methods of strings, lists and dictionaries.
fn python_method(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> std::result::Result<Value, JinjaError> {
    // The library's `count` looks for an empty string for ever.
    if let ("count", Some(text), [what]) = (method, value.as_str(), arguments)
        && what.as_str() == Some("")
    {
        return Ok(Value::from(text.chars().count() + 1));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// `{{ value }}`, as Python's `str` writes it.
fn format_as_python(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> std::result::Result<(), JinjaError> {
    match value.kind() {
        ValueKind::Bool | ValueKind::None | ValueKind::Seq | ValueKind::Map => {
            let mut text = String::new();
            python_repr(value, &mut text, 0)?;
            out.write_str(&text).map_err(JinjaError::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's `repr`.
fn python_repr(value: &Value, out: &mut String, depth: usize) -> std::result::Result<(), JinjaError> {
    if depth > MAX_DEPTH {
        return Err(JinjaError::new(ErrorKind::InvalidOperation, "a value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for character in text.chars() {
                match character {
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    '\\' => out.push_str("\\\\"),
                    _ if character == quote => out.extend(['\\', character]),
                    _ if character.is_control() => {
                        let _ = write!(out, "\\x{:02x}", character as u32);
                    }
                    _ => out.push(character),
                }
            }
            out.push(quote);
        }
        ValueKind::Seq => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                python_repr(&item, out, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                python_repr(&key, out, depth + 1)?;
                out.push_str(": ");
                python_repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

/// `json.dumps(value, ensure_ascii=False)`, with its arguments `indent` and `sort_keys`.
fn tojson(value: &Value, options: Kwargs) -> std::result::Result<Value, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    // Whatever else `json.dumps` takes says what is the case already, or has never been seen in a template.
    let _: (Option<Value>, Option<Value>) = (options.get("ensure_ascii")?, options.get("separators")?);
    options.assert_all_used()?;
    let mut json = serde_json::to_value(value).map_err(|error| {
        JinjaError::new(ErrorKind::BadSerialization, "tojson: the value cannot be written as JSON").with_source(error)
    })?;
    if sort == Some(true) {
        json.sort_all_objects();
    }
    let mut out = String::new();
    write_json(&json, indent.map(|indent| indent.min(16)), 0, &mut out);
    Ok(Value::from_safe_string(out))
}

fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |depth: usize, first: bool, out: &mut String| match indent {
        Some(indent) => {
            out.push_str(if first { "\n" } else { ",\n" });
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
        None => out.push_str(if first { "" } else { ", " }),
    };
    let close = |out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                line(depth + 1, index == 0, out);
                write_json(item, indent, depth + 1, out);
            }
            close(out);
            out.push(']');
        }
        serde_json::Value::Object(items) if !items.is_empty() => {
            out.push('{');
            for (index, (key, item)) in items.iter().enumerate() {
                line(depth + 1, index == 0, out);
                let _ = write!(out, "{}: ", serde_json::Value::from(key.as_str()));
                write_json(item, indent, depth + 1, out);
            }
            close(out);
            out.push('}');
        }
        scalar => {
            let _ = write!(out, "{scalar}");
        }
    }
}

/// `datetime.now().strftime(format)`: the local time.
fn strftime_now(format: String) -> std::result::Result<String, JinjaError> {
    let invalid = |message: &'static str| JinjaError::new(ErrorKind::InvalidOperation, message);
    let format = std::ffi::CString::new(format).map_err(|_| invalid("strftime_now: the format contains a NUL"))?;
    if format.as_bytes().is_empty() {
        return Ok(String::new());
    }
    let mut text = [0u8; 1024];
    // SAFETY: `time` writes nowhere when given NULL. `localtime_r` writes the zeroed `tm`, a plain C struct for which
    // zero is a value, and keeps no pointer. `strftime` reads a NUL-terminated format and that `tm`, and writes at most
    // `text.len()` bytes, of which it returns how many.
    let length = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut parts: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut parts).is_null() {
            return Err(invalid("strftime_now: the system's time cannot be converted"));
        }
        libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), &parts)
    };
    if length == 0 {
        return Err(invalid("strftime_now: the format makes more than 1023 characters, or none"));
    }
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(messages, true)
    }

    fn hello() -> Vec<Message> {
        vec![Message::new("user", "Hello")]
    }

    #[test]
    fn python_spellings() {
        for (source, expected) in [
            ("{{ true }} {{ none }} {{ false }} {{ missing }}", "True None False "),
            ("{{ [1, 'a', none, true] }}", "[1, 'a', None, True]"),
            ("{{ {'b': 1, 'a': \"it's\"} }}", "{'b': 1, 'a': \"it's\"}"),
            ("{{ ['\\n\\'\"'] }}", r#"['\n\'"']"#),
            ("{{ messages }}", "[{'role': 'user', 'content': 'Hello'}]"),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": "Hello"}]"#),
            ("{{ {'b': [1, {}], 'a': \"<é'&>\"} | tojson }}", r#"{"b": [1, {}], "a": "<é'&>"}"#),
            (
                "{{ {'b': [1], 'a': []} | tojson(indent=2, sort_keys=true) }}",
                "{\n  \"a\": [],\n  \"b\": [\n    1\n  ]\n}",
            ),
            ("{{ ' x '.strip() + 'a,b'.split(',')[1] + 'aXa'.replace('X', '-') }}", "xba-a"),
            ("{{ 'abc'.count('') }} {{ 'abcb'.count('b') }}", "4 2"),
            ("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools is none }}", "<s></s>TrueTrue"),
            ("{{ messages[0].content[:3] }}{{ messages[0]['role'] | upper }}", "HelUSER"),
        ] {
            assert_eq!(render(source, &hello()).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn blocks_and_loops() {
        let source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}\
                      {{ i }}{% endfor %}";
        assert_eq!(render(source, &[]).unwrap(), "023");
        // What Jinja2 makes of this with trim_blocks and lstrip_blocks.
        let source = "{% for i in range(2) %}\n    {% if i %}\n  {{ i }}\n    {%- endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(source, &[]).unwrap(), "  1end");
        let source =
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}";
        assert_eq!(render(source, &hello()).unwrap(), "1");
    }

    #[test]
    fn generation_tags_show_nothing() {
        let source = "a {%- generation %} b {% endgeneration -%} c{% if false %}{% endif %}";
        assert_eq!(without_generation_tags(source), "a {%- if true %} b {% endif -%} c{% if false %}{% endif %}");
        assert_eq!(render(source, &[]).unwrap(), "a b c");
        for odd in ["{%", "{% generation", "{%-%}", "{%%}", "{% é %} {% generation é %}", "{%- -%}"] {
            assert_eq!(without_generation_tags(odd), odd);
        }
    }

    #[test]
    fn the_time_is_local_time() {
        let text = render("{{ strftime_now('%d %b %Y') }}", &[]).unwrap();
        assert_eq!(text.split(' ').count(), 3, "{text}");
        assert!(text.ends_with(|c: char| c.is_ascii_digit()) && text.len() == 11, "{text}");
        assert_eq!(render("{{ strftime_now('') }}", &[]).unwrap(), "");
        assert!(render("{{ strftime_now('%Y' * 1000) }}", &[]).is_err());
    }

    #[test]
    fn refusals_are_the_callers_fault() {
        let error = render("{{ raise_exception('roles must alternate') }}", &hello()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
        assert!(error.message().ends_with("roles must alternate"), "{error}");
    }

    #[test]
    fn bad_templates_are_errors() {
        for source in ["{% for %}", "{{ missing.attribute }}", "{% include 'x' %}", "{{ 1 + none }}", "{{ no_such() }}"]
        {
            let error = render(source, &hello()).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidFormat, "{source}: {error}");
            assert!(!error.message().contains('\n'), "{error}");
        }
    }

    #[test]
    fn hostile_templates_end() {
        let deep = format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000));
        for source in [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 'x' * 1000000000000 }}",
            "{% for a in range(1000000000000) %}{% endfor %}",
            &format!("{{{{ {deep} }}}}"),
            &"{% if true %}".repeat(50_000),
            &"x".repeat(MAX_SOURCE + 1),
        ] {
            assert!(render(source, &hello()).is_err(), "{}", &source[..source.len().min(80)]);
        }
    }
}
