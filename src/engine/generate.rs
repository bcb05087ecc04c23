//! Sample, stream the text, stop: the loop that most callers want.

use crate::model::tokenizer::{StopStrings, TextStream};
use crate::{Error, Result};

use super::Session;
use super::sampling::SamplingOptions;

/// How to generate.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Most tokens to emit; 0 for as many as the session holds.
    pub max_tokens: usize,
    /// How to pick a token.
    pub sampling: SamplingOptions,
    /// Tokens that end the text, besides the model's own.
    pub stop_tokens: Vec<u32>,
    /// Go on past the model's own stop tokens.
    pub ignore_model_stop_tokens: bool,
    /// Texts that end the text; they are not emitted.
    pub stop_strings: Vec<String>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Finish {
    /// The model ended the text with a stop token, which is neither emitted nor kept.
    StopToken = 1,
    /// A stop string appeared.
    StopString = 2,
    /// `max_tokens` were emitted.
    Length = 3,
    /// The session is full.
    Context = 4,
    /// The callback asked to stop.
    Callback = 5,
}

/// What came of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens emitted.
    pub tokens: usize,
    /// The last token sampled: the stop token, where one ended the text.
    pub last_token: Option<u32>,
}

impl Session {
    /// Appends `prompt` (which may be empty where the session has logits), then samples and appends tokens until one of
    /// [`Finish`]. `emit` gets each token with the text that has become certain by it (whole characters, maybe none;
    /// what was held back comes with the last token once more) and returns whether to go on.
    ///
    /// Each token is a step of its own: after an error the session holds the prompt and every token emitted before it;
    /// after an error in the prompt, what it held before the call.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        emit: &mut dyn FnMut(u32, &str) -> bool,
    ) -> Result<Generated> {
        let model = self.model().clone();
        options.sampling.validate(model.config().vocabulary)?;
        if let Some(token) = options.stop_tokens.iter().find(|&&token| token as usize >= model.config().vocabulary) {
            return Err(Error::invalid_argument(format!("stop token {token} is not in the model's vocabulary")));
        }
        let mut stop_tokens = options.stop_tokens.clone();
        if !options.ignore_model_stop_tokens {
            stop_tokens.extend(model.stop_tokens());
        }
        // A model without a tokenizer generates tokens with empty texts.
        let mut text = match model.tokenizer() {
            Ok(tokenizer) => Some(TextStream::continuing(tokenizer, true)),
            Err(error) if !options.stop_strings.is_empty() => return Err(error.within("stop strings need text")),
            Err(_) => None,
        };
        let mut stops = StopStrings::new(&options.stop_strings)?;

        if prompt.is_empty() {
            self.logits()?;
        } else {
            self.prefill(prompt)?;
        }
        let mut emitted = 0;
        let (mut last_token, mut last_emitted) = (None, None);
        let finish = loop {
            if options.max_tokens != 0 && emitted == options.max_tokens {
                break Finish::Length;
            }
            if self.tokens().len() == self.capacity() {
                break Finish::Context;
            }
            let token = self.sample(&options.sampling)?;
            last_token = Some(token);
            if stop_tokens.contains(&token) {
                break Finish::StopToken;
            }
            self.decode(token)?;
            emitted += 1;
            last_emitted = Some(token);
            let certain = match &mut text {
                Some(text) => text.push(token)?,
                None => String::new(),
            };
            let (certain, stopped) = stops.push(&certain);
            let go_on = emit(token, &certain);
            if stopped {
                return Ok(Generated { finish: Finish::StopString, tokens: emitted, last_token });
            }
            if !go_on {
                return Ok(Generated { finish: Finish::Callback, tokens: emitted, last_token });
            }
        };
        // Text that was held back for a stop string or an unfinished character that never came.
        let rest = text.as_mut().map_or_else(String::new, |text| text.finish());
        let (mut rest, stopped) = stops.push(&rest);
        if !stopped {
            rest.push_str(&stops.finish());
        }
        if let (false, Some(token)) = (rest.is_empty(), last_emitted) {
            emit(token, &rest);
        }
        Ok(Generated { finish, tokens: emitted, last_token })
    }
}
