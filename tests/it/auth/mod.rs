//! Logins, sessions, tokens and passwords.

mod attempts;
mod disabled_users;
mod login;
mod password_reset;
mod passwords;
mod personal_access_tokens;
mod races;
mod refresh;
mod sessions;
mod signing_keys;
mod timing;
mod tokens;
