//! Values that every other module may use. Nothing here imports from this crate.

pub mod clock;
pub mod email;
pub mod error_chain;
pub mod id;
pub mod invalid;
pub mod jitter;
pub mod login;
pub mod secret_text;
pub mod text;
