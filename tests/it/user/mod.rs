//! Accounts.

mod deletion;
mod domains;
mod lists;
mod lookup;
mod races;
mod sign_up;
mod updates;

const UNKNOWN_USER_ID: &str = "01890000-0000-7000-8000-000000000000";
