//! What `fast-zero user` prints: tables for people, or one JSON document for scripts.
//!
//! Times are in UTC, as in RFC 3339. In JSON, `id`, `username`, `email`, `create_time` and
//! `update_time` have the names that they have in the `User` of the API. The other fields exist
//! only here.

use std::io::{self, BufWriter, Stdout, Write};

use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::count;
use crate::{
    auth::disabled_users::{DeletedCredentials, Disabled, Enabled},
    user::operator::{Account, AccountCounts},
};

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Text for people.
    Text,
    /// One JSON document.
    Json,
}

#[derive(Serialize)]
struct AccountJson<'a> {
    id: String,
    username: &'a str,
    email: &'a str,
    create_time: String,
    update_time: String,
    /// `null` if the user is not disabled.
    disabled_time: Option<String>,
}

impl<'a> AccountJson<'a> {
    fn new(account: &'a Account) -> Self {
        Self {
            id: account.id.to_string(),
            username: &account.username,
            email: &account.email,
            create_time: rfc3339(account.id.create_time()),
            update_time: rfc3339(account.updated_at),
            disabled_time: account.disabled_at.map(rfc3339),
        }
    }
}

#[derive(Serialize)]
struct ShownJson<'a> {
    #[serde(flatten)]
    account: AccountJson<'a>,
    todos: i64,
    active_sessions: i64,
    personal_access_tokens: i64,
    /// `null` if there is no open code.
    reset_code_expire_time: Option<String>,
}

#[derive(Serialize)]
struct DisabledJson<'a> {
    id: String,
    username: &'a str,
    disabled_time: String,
    ended_sessions: u64,
    revoked_personal_access_tokens: u64,
}

#[derive(Serialize)]
struct EnabledJson<'a> {
    id: String,
    username: &'a str,
    was_disabled: bool,
}

#[derive(Serialize)]
struct ResetCodeJson<'a> {
    id: String,
    username: &'a str,
    code: &'a str,
    /// `null` without `--url`.
    url: Option<&'a str>,
    expire_time: String,
}

#[derive(Serialize)]
struct DeletedJson<'a> {
    id: String,
    username: &'a str,
    deleted_todos: i64,
}

impl Format {
    /// Returns the format for scripts, or the one for people.
    pub(super) fn new(json: bool) -> Self {
        if json { Self::Json } else { Self::Text }
    }

    /// Starts a list of users.
    pub(super) fn start_list(self) -> List {
        let out = BufWriter::new(io::stdout());
        List { format: self, out, is_empty: true, widths: [0; COLUMNS] }
    }

    /// Prints a user with what the user has.
    pub(super) fn account(self, account: &Account, counts: &AccountCounts) -> io::Result<()> {
        if self == Self::Json {
            return print_json(&ShownJson {
                account: AccountJson::new(account),
                todos: counts.todos,
                active_sessions: counts.active_sessions,
                personal_access_tokens: counts.personal_access_tokens,
                reset_code_expire_time: counts.reset_code_expires_at.map(rfc3339),
            });
        }
        let none = || "-".to_owned();
        let lines = [
            ("ID", account.id.to_string()),
            ("USERNAME", account.username.clone()),
            ("EMAIL", account.email.clone()),
            ("CREATED", to_second(account.id.create_time())),
            ("UPDATED", to_second(account.updated_at)),
            ("DISABLED", account.disabled_at.map_or_else(none, to_second)),
            ("TODOS", counts.todos.to_string()),
            ("ACTIVE SESSIONS", counts.active_sessions.to_string()),
            ("PERSONAL ACCESS TOKENS", counts.personal_access_tokens.to_string()),
            ("RESET CODE EXPIRES", counts.reset_code_expires_at.map_or_else(none, to_second)),
        ];
        let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        let mut out = io::stdout().lock();
        lines.iter().try_for_each(|(name, value)| writeln!(out, "{name:width$}  {value}"))
    }

    /// Prints that a user is disabled.
    pub(super) fn disabled(self, account: &Account, disabled: &Disabled) -> io::Result<()> {
        let username = &*account.username;
        let DeletedCredentials { sessions, personal_access_tokens: tokens } = disabled.deleted;
        if self == Self::Json {
            return print_json(&DisabledJson {
                id: account.id.to_string(),
                username,
                disabled_time: rfc3339(disabled.since),
                ended_sessions: sessions,
                revoked_personal_access_tokens: tokens,
            });
        }
        let ended = count(sessions, "session");
        let revoked = count(tokens, "personal access token");
        let since = to_second(disabled.since);
        writeln!(
            io::stdout(),
            "{username} has been disabled since {since}: {ended} ended, {revoked} revoked"
        )
    }

    /// Prints that a user is enabled.
    pub(super) fn enabled(self, account: &Account, enabled: Enabled) -> io::Result<()> {
        let Enabled { was_disabled } = enabled;
        let username = &*account.username;
        match self {
            Self::Json => {
                print_json(&EnabledJson { id: account.id.to_string(), username, was_disabled })
            }
            Self::Text if was_disabled => writeln!(io::stdout(), "{username} is enabled"),
            Self::Text => writeln!(io::stdout(), "{username} was not disabled"),
        }
    }

    /// Prints a reset code, or its URL: alone on standard output, so that a script may pass it on.
    pub(super) fn reset_code(
        self,
        account: &Account,
        code: &str,
        url: Option<&str>,
        expires_at: OffsetDateTime,
    ) -> io::Result<()> {
        let username = &*account.username;
        if self == Self::Json {
            let (id, expire_time) = (account.id.to_string(), rfc3339(expires_at));
            return print_json(&ResetCodeJson { id, username, code, url, expire_time });
        }
        writeln!(io::stdout(), "{}", url.unwrap_or(code))?;
        writeln!(
            io::stderr(),
            "This code sets a new password for {username}, once, until {}. It ends \
             all sessions, and revokes all personal access tokens.",
            to_second(expires_at)
        )
    }

    /// Prints that a user is deleted.
    pub(super) fn deleted(self, account: &Account, todos: i64) -> io::Result<()> {
        let username = &*account.username;
        if self == Self::Json {
            let id = account.id.to_string();
            return print_json(&DeletedJson { id, username, deleted_todos: todos });
        }
        writeln!(io::stdout(), "{username} is deleted, with {}", count(todos, "todo"))
    }
}

fn print_json(value: &impl Serialize) -> io::Result<()> {
    writeln!(io::stdout(), "{}", serde_json::to_string_pretty(value)?)
}

const COLUMNS: usize = 5;
const HEADER: [&str; COLUMNS] = ["USERNAME", "EMAIL", "CREATED", "DISABLED", "ID"];

/// Written with the first user: an error before that leaves no half of a document.
const LIST_START: &str = "{\"users\":[\n";

/// A list of users that is being printed, page after page. The columns get wider with the texts.
pub(super) struct List {
    format: Format,
    out: BufWriter<Stdout>,
    is_empty: bool,
    widths: [usize; COLUMNS],
}

impl List {
    /// Prints further users.
    pub(super) fn write(&mut self, accounts: &[Account]) -> io::Result<()> {
        match self.format {
            Format::Json => self.write_json(accounts),
            Format::Text => self.write_rows(accounts),
        }
    }

    fn write_json(&mut self, accounts: &[Account]) -> io::Result<()> {
        for account in accounts {
            let separator = if self.is_empty { LIST_START } else { ",\n" };
            self.is_empty = false;
            write!(self.out, "{separator}{}", serde_json::to_string(&AccountJson::new(account))?)?;
        }
        Ok(())
    }

    fn write_rows(&mut self, accounts: &[Account]) -> io::Result<()> {
        let mut rows: Vec<_> = accounts.iter().map(row).collect();
        if self.is_empty {
            self.is_empty = false;
            rows.insert(0, HEADER.map(str::to_owned));
        }
        for row in &rows {
            for (width, text) in self.widths.iter_mut().zip(row) {
                *width = text.chars().count().max(*width);
            }
        }
        for row in rows {
            let cells = row.iter().zip(self.widths).map(|(text, width)| format!("{text:width$}"));
            writeln!(self.out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }

    /// Ends the list.
    pub(super) fn finish(mut self) -> io::Result<()> {
        match self.format {
            Format::Json if self.is_empty => writeln!(self.out, "{LIST_START}]}}")?,
            Format::Json => writeln!(self.out, "\n]}}")?,
            Format::Text if self.is_empty => writeln!(self.out, "{}", HEADER.join("  "))?,
            Format::Text => {}
        }
        self.out.flush()
    }
}

fn row(account: &Account) -> [String; COLUMNS] {
    [
        account.username.clone(),
        account.email.clone(),
        to_second(account.id.create_time()),
        account.disabled_at.map_or_else(|| "-".to_owned(), to_second),
        account.id.to_string(),
    ]
}

/// Returns a time as RFC 3339 has it. All times of rows have years of four digits.
fn rfc3339(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_default()
}

/// Returns a time for people, without the fraction of the second.
fn to_second(time: OffsetDateTime) -> String {
    rfc3339(time.replace_nanosecond(0).unwrap_or(time))
}
