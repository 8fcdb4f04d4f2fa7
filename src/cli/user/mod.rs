//! `fast-zero user`: what an operator does with users, on the database itself.
//!
//! The owner of the database is the operator: no role, no rpc and no running service is needed.

mod output;
mod reset_url;

use std::{
    io::{self, BufRead, IsTerminal, Write},
    process::ExitCode,
};

use clap::{Args, Subcommand, error::ErrorKind};
use secrecy::ExposeSecret;

use self::{output::Format, reset_url::ResetUrl};
use super::{ExitError, print_error, source::DatabaseSource};
use crate::{
    auth::{self, disabled_users, password_reset},
    config::{DatabaseConfig, LogConfig},
    database::{Database, connect, migrate},
    rpc::error::Error,
    types::{
        error_chain::BoxError,
        id::UserId,
        login::LoginIdentifier,
        text::{LineMode, parse_filter},
    },
    user::{
        operator::Account,
        store::operator::{LIST_PAGE_SIZE, OperatorStore},
    },
};

/// The exit code if there is no such user.
const NO_SUCH_USER: u8 = 3;

/// The longest text to search for, in characters: that of an email address.
///
/// Test: `wrong_usage_is_refused_before_anything_happens`.
const MAX_QUERY_LEN: usize = 254;

/// One connection: the statements follow each other.
const CONNECTIONS: usize = 1;

const EXIT_CODES: &str =
    "Exit codes: 0 done, 1 failed, 3 no such user, 64 wrong usage, 78 invalid setting";

/// The arguments of the subcommand.
#[derive(Debug, Args)]
#[command(after_help = format!("Example: fast-zero user disable ana\n\n{EXIT_CODES}"))]
pub(super) struct UserArgs {
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// List users, the oldest first
    #[command(after_help = format!("Example: fast-zero user list --query @example.com\n\n{EXIT_CODES}"))]
    List(Box<ListArgs>),
    /// Show a user: names, times, and the number of todos, sessions and tokens
    #[command(after_help = format!("Example: fast-zero user show ana@example.com\n\n{EXIT_CODES}"))]
    Show(Box<NamedArgs>),
    /// Lock a user out: end all sessions, revoke all personal access tokens, and reject logins
    #[command(after_help = format!("Example: fast-zero user disable ana\n\n{EXIT_CODES}"))]
    Disable(Box<NamedArgs>),
    /// Let a disabled user log in again; sessions and tokens do not come back
    #[command(after_help = format!("Example: fast-zero user enable ana\n\n{EXIT_CODES}"))]
    Enable(Box<NamedArgs>),
    /// Print a one-time code with which the user sets a new password within 30 minutes
    #[command(after_help = format!(
        "Example: fast-zero user reset-password ana --url 'https://example.com/reset#{{code}}'\n\n{EXIT_CODES}"
    ))]
    ResetPassword(Box<ResetArgs>),
    /// Delete a user with all todos; asks before, if it runs on a terminal
    #[command(after_help = format!("Example: fast-zero user delete ana --yes\n\n{EXIT_CODES}"))]
    Delete(Box<DeleteArgs>),
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// Print one JSON document, for scripts
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    database: DatabaseConfig,
    #[command(flatten)]
    log: LogConfig,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Only users whose username or email address contains this text, in any case
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    query: String,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct NamedArgs {
    /// Username, email address or ID, in any case
    name: String,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
struct ResetArgs {
    /// URL to print with the code in its fragment, which no server sees: in place of {code}, or appended
    #[arg(long, value_name = "TEMPLATE")]
    url: Option<String>,
    #[command(flatten)]
    named: NamedArgs,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// Delete without a question
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    named: NamedArgs,
}

impl UserArgs {
    /// Returns the settings of the log.
    pub(super) fn log(&self) -> LogConfig {
        self.command.common().log.clone()
    }
}

impl UserCommand {
    fn common(&self) -> &CommonArgs {
        match self {
            Self::List(args) => &args.common,
            Self::Show(args) | Self::Disable(args) | Self::Enable(args) => &args.common,
            Self::ResetPassword(args) => &args.named.common,
            Self::Delete(args) => &args.named.common,
        }
    }

    /// Checks everything that needs no database.
    fn into_action(self) -> Result<Action, ExitError> {
        let (name, action) = match self {
            Self::List(args) => {
                let query = parse_filter(&args.query, LineMode::Single, MAX_QUERY_LEN);
                let query = query.map_err(|invalid| format!("--query {}", invalid.as_str()));
                return Ok(Action::List(query.map_err(|message| usage(&message))?));
            }
            Self::Show(args) => (args.name, UserAction::Show),
            Self::Disable(args) => (args.name, UserAction::Disable),
            Self::Enable(args) => (args.name, UserAction::Enable),
            Self::ResetPassword(args) => {
                let url = args.url.as_deref().map(ResetUrl::parse).transpose();
                (args.named.name, UserAction::ResetPassword(url.map_err(usage)?))
            }
            Self::Delete(args) if args.yes || io::stdin().is_terminal() => {
                (args.named.name, UserAction::Delete { ask: !args.yes })
            }
            Self::Delete(_) => {
                return Err(usage("--yes is required where there is no terminal to ask"));
            }
        };
        Ok(Action::OnUser(name, action))
    }
}

fn usage(message: &str) -> ExitError {
    let message = format!("{message}\n");
    ExitError::Usage(clap::Error::raw(ErrorKind::MissingRequiredArgument, message))
}

/// A command whose arguments are valid.
enum Action {
    /// With the case-folded text to search for.
    List(Option<String>),
    /// With the name of the user.
    OnUser(String, UserAction),
}

enum UserAction {
    Show,
    Disable,
    Enable,
    ResetPassword(Option<ResetUrl>),
    Delete { ask: bool },
}

pub(super) async fn run(args: UserArgs) -> Result<ExitCode, ExitError> {
    let common = args.command.common();
    let (mut config, format) = (common.database.clone(), Format::new(common.json));
    let action = args.command.into_action()?;
    let is_list = matches!(action, Action::List(_));
    let source = DatabaseSource::open(&mut config).await?;
    let result = run_on(&config, action, format).await;
    source.close().await;
    match result {
        // A reader such as `head` has seen enough of a list.
        Err(ExitError::Runtime(error)) if is_list && is_broken_pipe(&error) => {
            Ok(ExitCode::SUCCESS)
        }
        result => result,
    }
}

fn is_broken_pipe(error: &BoxError) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn run_on(
    config: &DatabaseConfig,
    action: Action,
    format: Format,
) -> Result<ExitCode, ExitError> {
    let options = config.required_options()?;
    let connected = async {
        let mut connection = connect::connect_and_check(&options, config.wait()).await?;
        migrate::require_schema(&mut connection).await?;
        let database = Database::new(options.clone(), CONNECTIONS)?;
        // The clock follows that of the database.
        database.warm_up().await?;
        Ok(database)
    };
    let operator = connected.await.map_err(Error::into_source).map(Operator::new)?;
    let (name, action) = match action {
        Action::List(query) => return operator.list(query.as_deref(), format).await,
        Action::OnUser(name, action) => (name, action),
    };
    let Some(account) = operator.find(&name).await.map_err(Error::into_source)? else {
        // The name may be a secret in the wrong place, so it is not repeated.
        print_error(&"no user has this username, email address or ID");
        return Ok(ExitCode::from(NO_SUCH_USER));
    };
    match action {
        UserAction::Show => operator.show(&account, format).await,
        UserAction::Disable => operator.disable(&account, format).await,
        UserAction::Enable => operator.enable(&account, format).await,
        UserAction::ResetPassword(url) => {
            operator.reset_password(&account, url.as_ref(), format).await
        }
        UserAction::Delete { ask } => operator.delete(&account, ask, format).await,
    }
}

struct Operator {
    database: Database,
    users: OperatorStore,
}

impl Operator {
    fn new(database: Database) -> Self {
        Self { users: OperatorStore::new(database.clone()), database }
    }

    /// Finds a user by ID, or by a login. An ID is longer than a username.
    async fn find(&self, name: &str) -> Result<Option<Account>, Error> {
        let id = match UserId::parse(&name.to_ascii_lowercase()) {
            Ok(id) => Some(id),
            Err(_) => auth::find_user_id(&self.database, &LoginIdentifier::parse(name)).await?,
        };
        match id {
            Some(id) => self.users.find(id).await,
            None => Ok(None),
        }
    }

    /// Writes page after page, so that the memory does not grow with the number of users.
    async fn list(&self, query: Option<&str>, format: Format) -> Result<ExitCode, ExitError> {
        let mut list = format.start_list();
        let mut after = None;
        loop {
            let page = self.users.list(after, query).await.map_err(Error::into_source)?;
            list.write(&page)?;
            if page.len() < LIST_PAGE_SIZE {
                break;
            }
            after = page.last().map(|newest| newest.id);
        }
        list.finish()?;
        Ok(ExitCode::SUCCESS)
    }

    async fn show(&self, account: &Account, format: Format) -> Result<ExitCode, ExitError> {
        let counts = self.users.count(account.id).await.map_err(Error::into_source)?;
        format.account(account, &counts)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn disable(&self, account: &Account, format: Format) -> Result<ExitCode, ExitError> {
        let disabled = disabled_users::disable(&self.database, account.id).await;
        let Some(disabled) = disabled.map_err(Error::into_source)? else {
            return Ok(deleted_meanwhile());
        };
        format.disabled(account, &disabled)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn enable(&self, account: &Account, format: Format) -> Result<ExitCode, ExitError> {
        let enabled = disabled_users::enable(&self.database, account.id).await;
        let Some(enabled) = enabled.map_err(Error::into_source)? else {
            return Ok(deleted_meanwhile());
        };
        format.enabled(account, enabled)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn reset_password(
        &self,
        account: &Account,
        url: Option<&ResetUrl>,
        format: Format,
    ) -> Result<ExitCode, ExitError> {
        let code = match password_reset::create(&self.database, account.id).await {
            Ok(code) => code,
            Err(Error::UserNotFound) => return Ok(deleted_meanwhile()),
            Err(Error::UserDisabled) => {
                let name = &account.username;
                let message =
                    format!("{name} is disabled: run `fast-zero user enable {name}` first");
                return Err(ExitError::Runtime(message.into()));
            }
            Err(error) => return Err(error.into_source().into()),
        };
        let text = code.text.expose_secret();
        let url = url.map(|url| url.with_code(text));
        format.reset_code(account, text, url.as_deref(), code.expires_at)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn delete(
        &self,
        account: &Account,
        is_asked: bool,
        format: Format,
    ) -> Result<ExitCode, ExitError> {
        let counts = self.users.count(account.id).await.map_err(Error::into_source)?;
        if is_asked && !ask(account, counts.todos)? {
            return Err(ExitError::Runtime("not deleted".into()));
        }
        if !self.users.delete(account.id).await.map_err(Error::into_source)? {
            return Ok(deleted_meanwhile());
        }
        format.deleted(account, counts.todos)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn deleted_meanwhile() -> ExitCode {
    print_error(&"the user was deleted in the meantime");
    ExitCode::from(NO_SUCH_USER)
}

/// Asks on the terminal whether to delete a user.
fn ask(account: &Account, todos: i64) -> io::Result<bool> {
    let (username, email) = (&account.username, &account.email);
    let mut terminal = io::stderr();
    write!(terminal, "Delete {username} <{email}> and {} for good? [y/N] ", count(todos, "todo"))?;
    terminal.flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(&*answer.trim().to_lowercase(), "y" | "yes"))
}

/// Returns a number with its noun.
fn count(number: impl TryInto<u64>, noun: &str) -> String {
    let number = number.try_into().unwrap_or_default();
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}
