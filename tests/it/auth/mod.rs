//! Logins, sessions, tokens and passwords.

mod attempts;
mod login;
mod passwords;
mod races;
mod refresh;
mod sessions;
mod timing;
mod tokens;
