//! Errors: candle's type, with messages that start with the name of this crate.

use candle_core::Error;
use std::fmt::Display;

/// The name of the lookup op in candle, and the prefix of all error messages.
pub(crate) const NAME: &str = "hashed-embedding-bag";

/// `hashed-embedding-bag: <message>`, with a backtrace if candle is configured to capture one.
pub(crate) fn error(message: impl Display) -> Error {
    Error::msg(format!("{NAME}: {message}")).bt()
}

/// Returns from the function with the [`error`] of a formatted message.
macro_rules! bail {
    ($($message:tt)+) => {
        return Err($crate::error::error(format_args!($($message)+)))
    };
}
pub(crate) use bail;
