//! What was acknowledged outlives every crash.
//!
//! A few users work, each in its own model of what there is. Then PostgreSQL, the server
//! or both are killed in the middle of it and started again, and everything is read and
//! compared with the models. A call that was lost in the crash has two possible outcomes,
//! of which one must be found, as a whole, and stay.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    ops::Range,
    path::PathBuf,
    time::Instant,
};

use fast_zero::proto::{
    auth::v1::LogoutScope,
    todo::v1::{ListTodosRequest, Todo, TodoState},
};
use fastrand::Rng;
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::{
    sync::mpsc::{UnboundedSender, unbounded_channel},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::support::{
    Client, PASSWORD,
    app::connect,
    assert::assert_unauthenticated,
    embedded::{Postgres, place},
    process::{Process, Run},
    random,
    todos::titled,
    wait::{eventually, in_time},
};

const WORKERS: usize = 8;

/// More sessions than these a worker does not open: far below the limit, at which the
/// service would end the oldest.
const MAX_SESSIONS: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_outlives_crashes() {
    outlive(2, 20..60).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn what_was_acknowledged_outlives_many_crashes() {
    outlive(24, 50..500).await;
}

/// Kills as often, each time after so many acknowledged writes.
async fn outlive(kills: usize, between: Range<usize>) {
    let begun = Instant::now();
    let mut rng = Rng::with_seed(random::seed());
    let mut service = Service::start().await;
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        workers.push(Worker::new(&service, number, rng.fork()).await);
    }
    let mut figures = Figures::default();
    for target in [Target::Both, Target::Postgres, Target::Server].into_iter().cycle().take(kills) {
        let (acknowledge, mut acknowledged) = unbounded_channel();
        let stop = CancellationToken::new();
        let mut working: JoinSet<_> = mem::take(&mut workers)
            .into_iter()
            .map(|worker| worker.work(acknowledge.clone(), stop.clone()))
            .collect();
        drop(acknowledge);
        for _ in 0..rng.usize(between.clone()) {
            acknowledged.recv().await.expect("nothing is lost before the crash");
        }
        service.kill(target);
        stop.cancel();
        while let Some(worker) = working.join_next().await {
            workers.push(worker.expect("no answer was wrong"));
        }
        service.restart(target, &workers[0]).await;
        let checking = workers.into_iter().map(|worker| worker.check(service.channel.clone()));
        let mut checking: JoinSet<_> = checking.collect();
        workers = Vec::new();
        while let Some(checked) = checking.join_next().await {
            let (worker, outcome) = checked.expect("it is as it should be");
            figures.count(outcome);
            workers.push(worker);
        }
    }
    let users = service.postgres().ask("select count(*)::text from users").await;
    assert_eq!(users, WORKERS.to_string(), "nobody signed up");
    // Faster than an orderly stop of what is thrown away.
    service.kill(Target::Both);

    let sum = |of: fn(&Worker) -> usize| workers.iter().map(of).sum::<usize>();
    let (acknowledged, revoked) =
        (sum(|worker| worker.acknowledged), sum(|worker| worker.revoked.len()));
    let Figures { done, undone } = figures;
    println!(
        "{kills} kills in {:.1?}: {acknowledged} acknowledged writes, {revoked} ended sessions, \
         {} unknown outcomes ({done} done, {undone} not), 0 mismatches",
        begun.elapsed(),
        done + undone,
    );
}

/// What became of the calls whose answer was lost.
#[derive(Default)]
struct Figures {
    done: usize,
    undone: usize,
}

impl Figures {
    fn count(&mut self, outcome: Option<bool>) {
        match outcome {
            Some(true) => self.done += 1,
            Some(false) => self.undone += 1,
            None => {}
        }
    }
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Both,
    Postgres,
    Server,
}

/// The real binary on a durable PostgreSQL of its own.
struct Service {
    home: PathBuf,
    /// `None` while it is killed.
    postgres: Option<Postgres>,
    server: Process,
    channel: Channel,
    _place: TempDir,
}

fn start_server(url: &str) -> Process {
    Run::server(url).env("RUST_LOG", "warn,fast_zero::server=info").start()
}

async fn channel_to(server: &Process) -> Channel {
    connect(server.address().await.parse().expect("an address")).await
}

impl Service {
    async fn start() -> Self {
        let place = place();
        let home = place.path().join("data");
        let postgres = Postgres::start(&home);
        let server = start_server(&postgres.url);
        let channel = channel_to(&server).await;
        Self { home, postgres: Some(postgres), server, channel, _place: place }
    }

    fn postgres(&self) -> &Postgres {
        self.postgres.as_ref().expect("it runs")
    }

    fn kill(&mut self, target: Target) {
        if target != Target::Server {
            self.postgres.take().expect("it runs").crash(&self.home);
        }
        if target != Target::Postgres {
            self.server.signal(Signal::SIGKILL);
        }
    }

    /// Starts again what was killed, and waits until the service answers somebody.
    async fn restart(&mut self, target: Target, somebody: &Worker) {
        if target != Target::Server {
            self.postgres = Some(Postgres::start(&self.home));
        }
        if target != Target::Postgres {
            self.server.end().await;
            self.no_fault_was_logged();
            self.no_statement_goes_on().await;
            self.server = start_server(&self.postgres().url);
            self.channel = channel_to(&self.server).await;
        }
        let client = somebody.client.clone().through(&self.channel);
        eventually("it answers", async || client.try_get_user("me").await.is_ok()).await;
        self.no_fault_was_logged();
    }

    /// PostgreSQL may still be at what the killed server has sent.
    async fn no_statement_goes_on(&self) {
        let connected = "select exists (
            select from pg_stat_activity where application_name = 'fast-zero'
        )::text";
        eventually("PostgreSQL has noticed", async || {
            self.postgres().ask(connected).await == "false"
        })
        .await;
    }

    /// A database that is away is a warning.
    fn no_fault_was_logged(&self) {
        let output = self.server.output();
        assert!(!output.contains("\"level\":\"ERROR\""), "{output}");
    }
}

/// A user, and all that is theirs as far as they know.
struct Worker {
    name: String,
    password: String,
    rng: Rng,
    /// With the session that makes the calls, which does not end.
    client: Client,
    /// Of that session; `None` if the answer to the last refresh was lost.
    refresh_token: Option<String>,
    todos: BTreeMap<String, Todo>,
    /// The other sessions; without tokens if the answer to the login was lost.
    others: BTreeMap<String, Option<Client>>,
    /// Sessions that have ended.
    revoked: Vec<Client>,
    /// The call whose answer was lost in the crash.
    unknown: Option<Call>,
    acknowledged: usize,
}

/// A write.
#[derive(Clone, Debug)]
enum Call {
    Create(Todo),
    Update(Todo),
    Delete(String),
    LogIn,
    Refresh(String),
    Revoke(String),
    LogOutOthers,
    ChangePassword(String),
}

/// What there is of a user: to-dos, and the ids of sessions.
type Seen = (BTreeMap<String, Todo>, BTreeSet<String>);

impl Worker {
    async fn new(service: &Service, number: usize, rng: Rng) -> Self {
        let name = format!("worker{number}");
        let anonymous = Client::new(service.channel.clone());
        anonymous.sign_up(&name, &format!("{name}@example.com"), PASSWORD).await;
        let client = anonymous.logged_in(&name, PASSWORD).await.expect("logged in");
        Self {
            name,
            password: PASSWORD.to_owned(),
            rng,
            refresh_token: Some(client.tokens().refresh_token.clone()),
            client,
            todos: BTreeMap::new(),
            others: BTreeMap::new(),
            revoked: Vec::new(),
            unknown: None,
            acknowledged: 0,
        }
    }

    /// Makes calls until it is to stop, or does not know what came of one.
    async fn work(mut self, acknowledge: UnboundedSender<()>, stop: CancellationToken) -> Self {
        while !stop.is_cancelled() {
            let call = self.any_call();
            match self.make(&call).await {
                Ok(()) => {
                    self.acknowledged += 1;
                    // Nobody counts any more after the crash.
                    let _ = acknowledge.send(());
                }
                Err(status) => {
                    assert!(is_unknown(&status), "{call:?}: {status:?}");
                    self.unknown = Some(call);
                    break;
                }
            }
        }
        self
    }

    fn any_call(&mut self) -> Call {
        let todo = self.rng.choice(self.todos.values()).cloned();
        let other = self.rng.choice(self.others.keys()).cloned();
        let text = format!("{:016x}", self.rng.u64(..));
        match (self.rng.u8(..40), todo, other, self.refresh_token.clone()) {
            (0..12, Some(todo), ..) => {
                let (state, etag) = (self.any_state(), String::new());
                Call::Update(Todo { title: text, state, etag, ..todo })
            }
            (12..20, Some(todo), ..) => Call::Delete(todo.id),
            (20..23, ..) if self.others.len() < MAX_SESSIONS => Call::LogIn,
            (23..26, _, Some(other), _) => Call::Revoke(other),
            (26..28, .., Some(token)) => Call::Refresh(token),
            (28, ..) => Call::LogOutOthers,
            (29, ..) => Call::ChangePassword(text),
            _ => Call::Create(Todo { state: self.any_state(), ..titled(&text) }),
        }
    }

    fn any_state(&mut self) -> i32 {
        let states = [TodoState::Draft, TodoState::Todo, TodoState::Doing, TodoState::Done];
        self.rng.choice(states).expect("some").into()
    }

    /// Makes a call; once it is acknowledged, what it does is known.
    async fn make(&mut self, call: &Call) -> Result<(), Status> {
        let client = self.client.clone();
        match call {
            Call::Create(todo) => {
                let answer = client.try_create_todo(Some(todo.clone())).await?;
                self.put(todo, answer.into_inner().todo.expect("a to-do"));
            }
            Call::Update(todo) => {
                let mask: &[&str] = &["title", "state"];
                let answer = client.try_update_todo(Some(todo.clone()), Some(mask)).await?;
                self.put(todo, answer.into_inner().todo.expect("a to-do"));
            }
            Call::Delete(id) => {
                client.try_delete_todo(id, "").await?;
                self.todos.remove(id);
            }
            Call::LogIn => {
                let session = client.logged_in(&self.name, &self.password).await?;
                self.others.insert(session.tokens().session_id.clone(), Some(session));
            }
            Call::Refresh(token) => {
                self.refresh_token = None;
                let tokens = client.try_refresh(token).await?.into_inner().tokens;
                self.refresh_token = Some(tokens.expect("tokens").refresh_token);
            }
            Call::Revoke(id) => {
                client.try_revoke(id).await?;
                self.end(id);
            }
            Call::LogOutOthers => {
                client.try_log_out(LogoutScope::OtherSessions.into()).await?;
                self.end_others();
            }
            Call::ChangePassword(new) => {
                client.try_change_password(&self.password, new).await?;
                self.password.clone_from(new);
                self.end_others();
            }
        }
        Ok(())
    }

    fn put(&mut self, sent: &Todo, todo: Todo) {
        assert_eq!((&todo.title, todo.state), (&sent.title, sent.state));
        self.todos.insert(todo.id.clone(), todo);
    }

    fn end(&mut self, id: &str) {
        self.revoked.extend(self.others.remove(id).flatten());
    }

    fn end_others(&mut self) {
        self.revoked.extend(mem::take(&mut self.others).into_values().flatten());
    }

    /// Reads everything, and compares it with what is known. Whether the call whose answer
    /// was lost was done, if there was one.
    async fn check(mut self, channel: Channel) -> (Self, Option<bool>) {
        self.client = self.client.through(&channel);
        let seen = self.look().await;
        let outcome = match self.unknown.take() {
            None => None,
            Some(call) => {
                let done = match &call {
                    Call::ChangePassword(new) => self.can_log_in(new).await,
                    _ => seen != self.known(),
                };
                if done {
                    let ended = self.revoked.len();
                    self.adopt(call, &seen);
                    self.have_ended_by_now(ended, &channel).await;
                }
                Some(done)
            }
        };
        assert_eq!(seen, self.known(), "{}, whose lost call was done: {outcome:?}", self.name);

        // A rotation that was forgotten would make this token one that was never used.
        if let Some(token) = self.refresh_token.take() {
            self.refresh_token = Some(self.client.refresh(&token).await.refresh_token);
        }
        for other in self.others.values().flatten() {
            assert!(other.clone().through(&channel).is_alive().await, "nobody ended it");
        }
        for ended in &self.revoked {
            let ended = ended.clone().through(&channel);
            assert!(!ended.is_alive().await, "it was ended");
            let refused = ended.try_refresh(&ended.tokens().refresh_token).await;
            assert_unauthenticated(refused, "REFRESH_TOKEN_INVALID");
        }
        let password = self.password.clone();
        assert!(self.can_log_in(&password).await, "it is the password");
        (self, outcome)
    }

    fn known(&self) -> Seen {
        let own = self.client.tokens().session_id.clone();
        (self.todos.clone(), self.others.keys().cloned().chain([own]).collect())
    }

    async fn look(&self) -> Seen {
        let todos = self.client.all_todos(ListTodosRequest::default()).await;
        let sessions = self.client.list_sessions().await;
        let todos = todos.into_iter().map(|todo| (todo.id.clone(), todo));
        (todos.collect(), sessions.into_iter().map(|session| session.id).collect())
    }

    /// Logs in, and out again.
    async fn can_log_in(&mut self, password: &str) -> bool {
        match self.client.logged_in(&self.name, password).await {
            Ok(session) => {
                session.log_out(LogoutScope::ThisSession).await;
                self.revoked.push(session);
                true
            }
            Err(refused) => {
                assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
                false
            }
        }
    }

    /// Makes a call that was done known. What it made is what was seen and fits.
    fn adopt(&mut self, call: Call, (todos, sessions): &Seen) {
        match call {
            Call::Create(sent) => {
                let made = todos.values().find(|todo| todo.title == sent.title);
                self.put(&sent, made.expect("nothing else was called").clone());
            }
            Call::Update(sent) => {
                let made = todos.get(&sent.id).expect("nobody deleted it");
                self.put(&sent, made.clone());
            }
            Call::Delete(id) => drop(self.todos.remove(&id)),
            Call::LogIn => {
                let (_, known) = self.known();
                self.others
                    .extend(sessions.difference(&known).map(|id| (id.clone(), None)).take(1));
            }
            Call::Refresh(_) => {}
            Call::Revoke(id) => self.end(&id),
            Call::LogOutOthers => self.end_others(),
            Call::ChangePassword(new) => {
                self.password = new;
                self.end_others();
            }
        }
    }

    /// A server that outlived its database does not know whether it ended a session, and
    /// may take it for alive for the five seconds that it may take.
    async fn have_ended_by_now(&self, from: usize, channel: &Channel) {
        for ended in &self.revoked[from..] {
            let ended = ended.clone().through(channel);
            let noticed = async { while ended.is_alive().await {} };
            in_time("the end of a session is noticed", noticed).await;
        }
    }
}

/// The answer was lost, or says that the database was: the call may have been done.
fn is_unknown(status: &Status) -> bool {
    let details = status.get_error_details();
    // Every answer of the service has a reason.
    let reason = details.error_info().map(|info| &*info.reason);
    reason.is_none_or(|reason| ["DATABASE_UNAVAILABLE", "DEADLINE_EXCEEDED"].contains(&reason))
}
