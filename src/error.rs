//! Errors: candle's own type, each message under the name of this crate.

use candle_core::Error;
use std::fmt::Display;

/// The name of the lookup among candle's ops, and what the messages of all errors begin with.
pub(crate) const NAME: &str = "hashed-embedding-bag";

/// `hashed-embedding-bag: <message>`, with a backtrace where candle takes one.
pub(crate) fn error(message: impl Display) -> Error {
    Error::msg(format!("{NAME}: {message}")).bt()
}

/// Returns [`error`] of a formatted message.
macro_rules! bail {
    ($($message:tt)+) => {
        return Err($crate::error::error(format_args!($($message)+)))
    };
}
pub(crate) use bail;
