//! The programs that follow changes keep their copy in step.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo, TodoState};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout},
    time::{Instant, timeout_at},
};

use super::{Example, shell_command};
use crate::support::{
    Client,
    app::connect,
    client::PASSWORD,
    postgres::TestDatabase,
    process::{Binary, Process},
    proxy::Proxy,
    tokens::{Jwt, seconds_from_now},
};

/// The timeout for what a program prints. The first line comes after the compiler.
const TIMEOUT: Duration = Duration::from_mins(5);

/// A server that can restart at its address.
struct Server {
    database: TestDatabase,
    address: SocketAddr,
    process: Process,
}

impl Server {
    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let address = Proxy::reserve_address().await;
        let process = Self::serve(&database, address).await;
        Self { database, address, process }
    }

    async fn serve(database: &TestDatabase, address: SocketAddr) -> Process {
        let binary = Binary::server(&database.url()).env("LISTEN_ADDR", &address.to_string());
        let process = binary.start();
        process.address().await;
        process
    }

    /// Restarts the server, and connects the client again.
    async fn restart(&mut self, client: Client) -> Client {
        self.process.signal(Signal::SIGTERM);
        self.process.wait().await;
        self.process = Self::serve(&self.database, self.address).await;
        client.with_channel(&connect(self.address).await)
    }

    async fn execute(&self, statement: &'static str) {
        let mut connection = self.database.connect().await;
        sqlx::raw_sql(statement).execute(&mut connection).await.expect("a valid statement");
    }

    /// Does what an operator does after a restore of the database.
    async fn after_restore(&self) {
        let binary = Binary::new(&["after-restore"]).env("DATABASE_URL", &self.database.url());
        let (code, output) = binary.output().await;
        assert_eq!(code, Some(0), "{output}");
    }
}

/// A running program.
struct Follower {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// What it has printed, without the copies.
    printed: Vec<String>,
    /// The last copy that it has printed.
    copy: Option<Vec<String>>,
}

impl Follower {
    async fn next_line(&mut self) -> String {
        let line = self.lines.next_line().await.expect("UTF-8");
        line.unwrap_or_else(|| panic!("it ended: {:#?}", self.printed))
    }

    /// Reads a line, or a copy.
    async fn read(&mut self) {
        let line = self.next_line().await;
        let Some(rest) = line.strip_prefix("caught up: ") else {
            self.printed.push(line);
            return;
        };
        let count = rest.strip_suffix(" todos").expect("a count").parse().expect("a number");
        let mut copy = Vec::new();
        for _ in 0..count {
            copy.push(self.next_line().await);
        }
        self.copy = Some(copy);
    }

    fn count(&self, line: &str) -> usize {
        self.printed.iter().filter(|printed| *printed == line).count()
    }

    async fn wait_until(&mut self, is_met: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        while !is_met(self) {
            let read = timeout_at(deadline, self.read()).await;
            assert!(read.is_ok(), "timed out: {:#?}, copy: {:#?}", self.printed, self.copy);
        }
    }

    /// Waits until the copy equals the todos of the client.
    async fn wait_until_in_step(&mut self, client: &Client) {
        let line = |todo: Todo| {
            let state = todo.state().as_str_name();
            format!("  {} {state} {}", todo.etag, todo.title)
        };
        let todos = client.list_all_todos(ListTodosRequest::default()).await;
        let expected: Vec<_> = todos.into_iter().map(line).collect();
        self.wait_until(|program| program.copy.as_ref() == Some(&expected)).await;
    }

    async fn kill(&mut self) {
        self.child.kill().await.expect("killed");
    }
}

impl Example {
    fn follow(&self, server: &Server, copy: &Path, tokens: [&str; 2]) -> Follower {
        let script = self.follow_command.as_deref().expect("a program that follows changes");
        let address = server.address.to_string();
        let variables = [
            ("FASTZERO_ADDR", &*address),
            ("FASTZERO_COPY", copy.to_str().expect("UTF-8")),
            ("FASTZERO_ACCESS_TOKEN", tokens[0]),
            ("FASTZERO_REFRESH_TOKEN", tokens[1]),
        ];
        let mut command = shell_command(script, &self.dir, &variables);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("nice is installed");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Follower { child, lines, printed: Vec::new(), copy: None }
    }

    /// Asserts that the copy of the program equals the todos after all that can happen to both.
    pub(super) async fn assert_follows(&self) {
        let mut server = Server::start().await;
        let mut ana = Client::new(connect(server.address).await).signed_up("ana").await;
        let dir = TempDir::new().expect("a directory");
        let copy = dir.path().join("copy");
        let [first, second] = [ana.create_todo("first").await, ana.create_todo("second").await];

        // The server accepts the token for three more seconds.
        let expiring = Jwt::for_client(&ana).claim("exp", seconds_from_now(-2)).signed();
        let refresh_token = ana.tokens().refresh_token.clone();
        let mut program = self.follow(&server, &copy, [&expiring, &refresh_token]);
        program.wait_until_in_step(&ana).await;
        change_everything(&ana, first, &second).await;
        program.wait_until_in_step(&ana).await;
        program.wait_until(|program| program.count("refreshed the access token") == 1).await;

        ana = server.restart(ana).await;
        ana.delete_todo(&second.id).await;
        program.wait_until_in_step(&ana).await;
        program.kill().await;
        assert_eq!(program.count("full sync"), 1, "{:#?}", program.printed);
        assert_eq!(program.count("refreshed the access token"), 1, "{:#?}", program.printed);

        // It resumes with what it has stored.
        ana.create_todo("third").await;
        ana.undelete_todo(&second.id).await;
        let again = ana.logged_in("ana", PASSWORD).await.expect("logged in");
        let tokens = [&*again.tokens().access_token, &*again.tokens().refresh_token];
        let mut program = self.follow(&server, &copy, tokens);
        program.wait_until_in_step(&ana).await;
        assert_eq!(program.printed[..2], ["changed: third", "changed: second"]);

        // The backup of the database does not contain the third todo.
        server.execute("delete from todos where title = 'third'").await;
        server.after_restore().await;
        program.wait_until_in_step(&ana).await;
        assert_eq!(program.count("full sync"), 1, "{:#?}", program.printed);
        ana.create_todo("fourth").await;
        program.wait_until_in_step(&ana).await;
        program.kill().await;
    }
}

/// Creates, updates, deletes and undeletes todos.
async fn change_everything(ana: &Client, first: Todo, second: &Todo) {
    let done = Todo { state: TodoState::Done.into(), ..first };
    ana.update_todo(done, None).await;
    ana.delete_todo(&second.id).await;
    let deleted = ana.create_todo("deleted").await;
    ana.undelete_todo(&second.id).await;
    ana.delete_todo(&deleted.id).await;
    let purged = ana.create_todo("purged").await;
    ana.purge_todo(&purged.id).await;
}
