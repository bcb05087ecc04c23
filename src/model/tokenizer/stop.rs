//! Ending a text at the first of several strings.

use crate::{Error, Result};

/// Watches streamed text for stop strings.
///
/// Text goes in as it is generated and comes out as soon as it cannot be part of a stop string any more. The text ends
/// before the stop string that is complete first; of several that are complete at the same character, before the
/// longest. Where the text was cut into pushes makes no difference. A push costs its length times the number of
/// strings.
///
/// ```
/// # use kvahead::model::tokenizer::StopStrings;
/// let mut stop = StopStrings::new(&["\nUser:"])?;
/// assert_eq!(stop.push("Fine.\nUs"), ("Fine.".to_string(), false));
/// assert_eq!(stop.push("ually"), ("\nUsually".to_string(), false));
/// assert_eq!(stop.push(" so.\nUser"), (" so.".to_string(), false));
/// assert_eq!(stop.push(": and"), ("".to_string(), true));
/// assert_eq!(stop.matched(), Some("\nUser:"));
/// # Ok::<(), kvahead::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    held: String,
    matched: Option<usize>,
}

/// A string and its Knuth–Morris–Pratt automaton.
#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    /// Length of the longest proper border of `text[..i + 1]`.
    borders: Vec<usize>,
    /// How many bytes of the pattern the text so far ends with.
    state: usize,
}

impl Pattern {
    fn new(text: String) -> Pattern {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for at in 1..bytes.len() {
            while border > 0 && bytes[at] != bytes[border] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[at] == bytes[border]);
            borders[at] = border;
        }
        Pattern { text, borders, state: 0 }
    }

    /// Takes one byte; true where the pattern is complete with it.
    fn advance(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.state > 0 && bytes[self.state] != byte {
            self.state = self.borders[self.state - 1];
        }
        self.state += usize::from(bytes[self.state] == byte);
        self.state == bytes.len()
    }
}

impl StopStrings {
    /// A matcher for `strings`. An empty one is an error: it would end every text at once.
    pub fn new<S: AsRef<str>>(strings: &[S]) -> Result<StopStrings> {
        if strings.iter().any(|text| text.as_ref().is_empty()) {
            return Err(Error::invalid_argument("a stop string is empty; expected at least one character"));
        }
        let patterns = strings.iter().map(|text| Pattern::new(text.as_ref().to_string())).collect();
        Ok(StopStrings { patterns, held: String::new(), matched: None })
    }

    /// Takes generated text; returns the text that may be shown now, and whether a stop string has ended it. After
    /// that nothing comes any more.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.matched.is_some() {
            return (String::new(), true);
        }
        let seen = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for (index, pattern) in self.patterns.iter_mut().enumerate() {
                let length = pattern.text.len();
                if pattern.advance(byte) && longest.is_none_or(|(best, _)| length > best) {
                    longest = Some((length, index));
                }
            }
            if let Some((length, index)) = longest {
                self.matched = Some(index);
                // A match begins with the first byte of a string, so this is a border of characters; and what it
                // begins with was held back, as the start of that string.
                let mut shown = std::mem::take(&mut self.held);
                shown.truncate(seen + at + 1 - length);
                return (shown, true);
            }
        }
        let keep = self.patterns.iter().map(|pattern| pattern.state).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// Ends the text: returns what was held back for a stop string that did not come. The matcher is then as new.
    pub fn finish(&mut self) -> String {
        self.matched = None;
        for pattern in &mut self.patterns {
            pattern.state = 0;
        }
        std::mem::take(&mut self.held)
    }

    /// The stop string that ended the text, until [`StopStrings::finish`].
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.patterns[index].text.as_str())
    }

    /// Whether there are no strings to watch for.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, on the whole text.
    fn cut<'a>(text: &'a str, stops: &[&str]) -> (&'a str, bool) {
        let ends = stops.iter().filter_map(|stop| {
            let start = text.find(stop)?;
            Some((start + stop.len(), start))
        });
        match ends.min() {
            Some((_, start)) => (&text[..start], true),
            None => (text, false),
        }
    }

    fn streamed(text: &str, stops: &[&str], sizes: &[usize]) -> (String, bool) {
        let mut matcher = StopStrings::new(stops).unwrap();
        let (mut out, mut rest, mut sizes) = (String::new(), text, sizes.iter().cycle());
        while !rest.is_empty() {
            let size = *sizes.next().unwrap();
            let at = rest.char_indices().nth(size).map_or(rest.len(), |(at, _)| at);
            out.push_str(&matcher.push(&rest[..at]).0);
            rest = &rest[at..];
        }
        let matched = matcher.matched().is_some();
        out.push_str(&matcher.finish());
        (out, matched)
    }

    #[test]
    fn examples() {
        for (text, stops, expected) in [
            ("hello world", &["wor"][..], ("hello ", true)),
            ("hello wo", &["wor"], ("hello wo", false)),
            ("aaab", &["aab"], ("a", true)),
            ("abcd", &["abcd", "bc"], ("a", true)),
            ("xabc", &["bc", "abc"], ("x", true)),
            ("caféx", &["éx", "ex"], ("caf", true)),
            ("no stops", &[], ("no stops", false)),
            ("", &["a"], ("", false)),
        ] {
            for sizes in [&[1][..], &[2], &[3, 1], &[100]] {
                let (out, matched) = streamed(text, stops, sizes);
                assert_eq!((out.as_str(), matched), expected, "{text:?} {stops:?} {sizes:?}");
            }
        }
    }

    #[test]
    fn usable_again_after_finish() {
        let mut stop = StopStrings::new(&["ab"]).unwrap();
        assert_eq!(stop.push("xa"), ("x".into(), false));
        assert_eq!(stop.finish(), "a");
        assert_eq!(stop.push("b"), ("b".into(), false));
        assert_eq!(stop.push("ab"), ("".into(), true));
        assert_eq!(stop.push("later"), ("".into(), true));
        assert_eq!(stop.finish(), "");
        assert_eq!(stop.matched(), None);
        assert_eq!(stop.push("later"), ("later".into(), false));
    }

    #[test]
    fn an_empty_stop_string_is_an_error() {
        assert!(StopStrings::new(&["a", ""]).is_err());
    }

    proptest! {
        #[test]
        fn same_as_on_the_whole_text(
            text in "[abé]{0,40}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            sizes in prop::collection::vec(1usize..5, 1..5),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (out, matched) = streamed(&text, &stops, &sizes);
            prop_assert_eq!((out.as_str(), matched), cut(&text, &stops));
        }
    }
}
