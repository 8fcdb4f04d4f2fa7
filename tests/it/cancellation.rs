//! Calls whose caller goes away.
//!
//! A handler may be dropped at any of its awaits. What it was doing in the database then
//! either happens as a whole or not at all, and whatever it held is free again.

use std::{
    collections::{BTreeSet, HashMap},
    iter,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use fast_zero::{
    config::Config,
    proto::{
        DESCRIPTORS,
        auth::v1::{ListSessionsRequest, LogoutScope},
        todo::v1::{ListTodosRequest, Todo},
        user::v1::ListUsersRequest,
    },
};
use fastrand::Rng;
use prost::Message;
use prost_types::FileDescriptorSet;
use tokio::{task::JoinSet, time::timeout};
use tonic::{
    Code, Status,
    transport::{Channel, Error as TransportError},
};
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD,
    app::{config, connect},
    assert::assert_refused,
    parallel::at_once,
    random,
    statements::complaints_of,
    todos::{Answer, titled},
    tokens::Jwt,
    users::me,
    wait::{eventually, in_time},
};

const NEW: &str = "a new password";

/// Calls that are under way at the same time, each of another user.
const CALLERS: usize = 16;

/// After so many calls a caller opens a new connection. The client's HTTP/2 ends one on
/// which it was sent 1024 answers that it did not wait for.
const CALLS_PER_CONNECTION: usize = 500;

/// How long a call is waited for, in powers of two of a microsecond: from 32 µs, when it
/// has not left the client, to 130 ms, when it is most likely answered. Each doubling is
/// as likely as any other.
const PATIENCE: std::ops::RangeInclusive<u32> = 6..=17;

/// What all request ids of the calls that are given up begin with.
const REQUESTS: &str = "given-up-";

/// What the hashing queue of the tests' settings holds: one hash for each thread, and 16
/// that wait for each.
const HASHING_PLACES: usize = 4 * 17;

/// The user whom all logins are of, and how many sessions one may have.
const REGULAR: &str = "regular";
const MAX_SESSIONS: i64 = 100;

/// Every method of the contract, and what a call of it may be refused with here.
const METHODS: [(&str, &[Code]); 17] = [
    ("CreateUser", &[Code::ResourceExhausted]),
    ("GetUser", &[]),
    ("ListUsers", &[]),
    ("UpdateUser", &[]),
    ("DeleteUser", &[]),
    ("Login", &[Code::ResourceExhausted]),
    ("RefreshToken", &[]),
    ("Logout", &[]),
    ("ListSessions", &[]),
    ("RevokeSession", &[]),
    ("ChangePassword", &[Code::ResourceExhausted]),
    ("IntrospectToken", &[]),
    ("CreateTodo", &[]),
    ("GetTodo", &[]),
    ("ListTodos", &[]),
    ("UpdateTodo", &[]),
    // By an earlier call that nobody waited for.
    ("DeleteTodo", &[Code::NotFound]),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_given_up_at_any_moment_leave_nothing_behind() {
    give_up(2_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn a_hundred_thousand_calls_that_are_given_up_leave_nothing_behind() {
    give_up(100_000).await;
}

async fn give_up(calls: usize) {
    assert_eq!(methods(), METHODS.map(|(method, _)| method.to_owned()).into());
    let seed = random::seed();
    // Far more sign-ups than one peer makes otherwise.
    let settings = Config { sign_ups_per_peer_per_minute: u32::MAX, ..config() };
    let app = App::start_with(settings).await;
    let stage = Arc::new(Stage::set(&app, calls).await);
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        let caller = Caller::new(&app, number, seed).await;
        callers.spawn(caller.make_calls(stage.clone(), calls / CALLERS));
    }
    let begun = Instant::now();
    while let Some(ended) = callers.join_next().await {
        ended.expect("no caller saw what it should not");
    }
    println!("{calls} calls in {:.1?}, {CALLERS} at a time", begun.elapsed());

    nothing_is_open(&app).await;
    every_connection_can_be_used(&app).await;
    every_place_in_the_hashing_queue_is_free(&app).await;
    every_method_works(&app).await;
    assert_eq!(complaints_of(REQUESTS), Vec::<String>::new());
    no_write_is_half_done(&app, &stage).await;
    stage.print_figures();
}

/// The names of all methods of the contract.
fn methods() -> BTreeSet<String> {
    let descriptors = FileDescriptorSet::decode(DESCRIPTORS).expect("good descriptors");
    let services = descriptors.file.iter().flat_map(|file| &file.service);
    let methods = services.flat_map(|service| &service.method);
    methods.map(|method| method.name().to_owned()).collect()
}

/// What all callers share.
struct Stage {
    address: SocketAddr,
    victims: Mutex<Vec<Victim>>,
    /// Those that a call was made against, and whether it was answered.
    used: Mutex<Vec<(Victim, Deed, bool)>>,
    /// For each method.
    figures: [Figures; METHODS.len()],
}

#[derive(Default)]
struct Figures {
    answered: AtomicUsize,
    refused: AtomicUsize,
    given_up: AtomicUsize,
}

/// A user with a session, another session and two to-dos, of whom nothing may be left, or
/// everything.
#[derive(Clone, Copy)]
struct Victim {
    user: Uuid,
    session: Uuid,
    other: Uuid,
}

/// A call that ends more than one row, or a session.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Deed {
    DeleteUser,
    ChangePassword,
    RevokeOther,
    Logout(LogoutScope),
}

/// What is left of a victim: the version of the password, the sessions, how many to-dos.
type Left = (i64, BTreeSet<Uuid>, i64);

impl Victim {
    fn new() -> Self {
        Self { user: Uuid::now_v7(), session: Uuid::now_v7(), other: Uuid::now_v7() }
    }

    fn client(&self, channel: &Channel) -> Client {
        let token = Jwt::of(&self.user.to_string(), &self.session.to_string()).signed();
        Client::new(channel.clone()).with_token(&token)
    }

    fn untouched(&self) -> Left {
        (1, [self.session, self.other].into(), 2)
    }

    fn after(&self, deed: Deed) -> Option<Left> {
        let Self { session, other, .. } = *self;
        match deed {
            Deed::DeleteUser => None,
            Deed::ChangePassword => Some((2, [session].into(), 2)),
            Deed::RevokeOther | Deed::Logout(LogoutScope::OtherSessions) => {
                Some((1, [session].into(), 2))
            }
            Deed::Logout(LogoutScope::AllSessions) => Some((1, BTreeSet::new(), 2)),
            Deed::Logout(_) => Some((1, [other].into(), 2)),
        }
    }
}

impl Stage {
    async fn set(app: &App, calls: usize) -> Self {
        app.create_user(REGULAR).await;
        // As many as one may have, so that every login has to end one.
        app.execute(
            "insert into sessions (
                 user_id, id, generation, rotated_at, expires_at, user_agent, peer
             )
             select users.id, ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid,
                 0, now(), now() + interval '1 day', '', ''
             from users, generate_series(1, 100) as n",
        )
        .await;
        // Four methods of seventeen need one for each call.
        let victims: Vec<_> =
            iter::repeat_with(Victim::new).take(calls * 4 / 17 * 5 / 4 + 200).collect();
        insert(app, &victims).await;
        let (victims, used) = (Mutex::new(victims), Mutex::default());
        Self { address: app.address, victims, used, figures: <_>::default() }
    }

    fn victim(&self) -> Victim {
        let victim = self.victims.lock().expect("no panic").pop();
        victim.expect("there are more than are needed")
    }

    fn print_figures(&self) {
        let sum = |of: fn(&Figures) -> &AtomicUsize| -> usize {
            self.figures.iter().map(|figures| of(figures).load(Ordering::Relaxed)).sum()
        };
        for ((method, _), figures) in METHODS.iter().zip(&self.figures) {
            let Figures { answered, refused, given_up } = figures;
            println!("{method}: {answered:?} answered, {refused:?} refused, {given_up:?} given up");
        }
        let answered = sum(|figures| &figures.answered);
        let given_up = sum(|figures| &figures.given_up);
        println!("all: {answered} answered, {given_up} given up");
        assert!(answered > 0 && given_up > 0, "there were both");
    }
}

/// Adds victims, whose password is that of the regular user.
async fn insert(app: &App, victims: &[Victim]) {
    let of = |id: fn(&Victim) -> Uuid| victims.iter().map(id).collect::<Vec<_>>();
    let inserted = sqlx::query(
        "with victims as (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[]) as v (u, session, other)
         ), added as (
             insert into users (
                 id, username, username_folded, email, email_folded, password_hash,
                 password_version, updated_at, version
             )
             select u, u, u, u || '@example.com', u || '@example.com', password_hash, 1, now(), 1
             from victims, users where username = 'regular'
         ), opened as (
             insert into sessions (
                 user_id, id, generation, rotated_at, expires_at, user_agent, peer
             )
             select u, unnest(array[session, other]), 0, now(), now() + interval '1 day', '', ''
             from victims
         )
         insert into todos (
             owner_id, id, title, title_folded, description, description_folded, state,
             updated_at, version
         )
         select u, unnest(array[session, other]), 'a', 'a', '', '', 1, now(), 1 from victims",
    )
    .bind(of(|victim| victim.user))
    .bind(of(|victim| victim.session))
    .bind(of(|victim| victim.other))
    .execute(&mut app.sql().await)
    .await;
    inserted.expect("the statement works");
}

/// Makes calls, one after the other, and does not wait for most of them.
struct Caller {
    client: Client,
    /// On which calls are given up.
    channel: Channel,
    number: usize,
    rng: Rng,
    /// Of the client's session: the one that was not used yet.
    refresh_token: String,
    /// One that stays, and those that may be deleted.
    todo: Todo,
    todos: Vec<Todo>,
}

impl Caller {
    async fn new(app: &App, number: usize, seed: u64) -> Self {
        let client = app.signed_up(&format!("caller{number}")).await;
        let refresh_token = client.tokens().refresh_token.clone();
        let todo = client.create_todo("0").await;
        let rng = Rng::with_seed(seed.wrapping_add(number as u64));
        let channel = app.channel.clone();
        Self { client, channel, number, rng, refresh_token, todo, todos: Vec::new() }
    }

    async fn make_calls(mut self, stage: Arc<Stage>, calls: usize) {
        for call in 0..calls {
            if call % CALLS_PER_CONNECTION == 0 {
                self.channel = connect(stage.address).await;
            }
            let method = self.rng.usize(..METHODS.len());
            self.make_call(&stage, method, call).await;
        }
    }

    /// One call that is given up after a random time: by its deadline, which the server
    /// keeps, or because the caller is gone.
    async fn make_call(&mut self, stage: &Stage, method: usize, call: usize) {
        let request_id = format!("{REQUESTS}{}-{call}", self.number);
        let channel = self.channel.clone();
        let longest = 1 << self.rng.u32(PATIENCE);
        let micros = self.rng.u64(longest / 2..longest);
        let by_deadline = self.rng.u8(..4) == 0;
        let prepare = |client: Client| {
            let client = client.through(&channel).with("x-request-id", &request_id);
            if by_deadline { client.with("grpc-timeout", &format!("{micros}u")) } else { client }
        };

        let (name, refusals) = METHODS[method];
        let deed = self.deed(name);
        let victim = deed.map(|deed| (stage.victim(), deed));
        let client = match &victim {
            Some((victim, _)) => victim.client(&channel),
            None => self.client.clone(),
        };
        let call = self.call(name, victim, prepare(client));
        let patience = if by_deadline { 10_000_000 } else { micros };
        let answer = timeout(Duration::from_micros(patience), call).await;
        let figures = &stage.figures[method];
        let count = match &answer {
            Ok(Ok(())) => &figures.answered,
            Ok(Err(refused)) if by_deadline && is_late(refused) => &figures.given_up,
            Ok(Err(refused)) => {
                assert!(refusals.contains(&refused.code()), "{name}: {refused:?}");
                &figures.refused
            }
            Err(_) => {
                assert!(!by_deadline, "{name}: the deadline was not kept");
                &figures.given_up
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some((victim, deed)) = victim {
            let answered = matches!(answer, Ok(Ok(())));
            stage.used.lock().expect("no panic").push((victim, deed, answered));
        }
        self.follow_up(name).await;
    }

    fn deed(&mut self, method: &str) -> Option<Deed> {
        let scopes =
            [LogoutScope::ThisSession, LogoutScope::OtherSessions, LogoutScope::AllSessions];
        match method {
            "DeleteUser" => Some(Deed::DeleteUser),
            "ChangePassword" => Some(Deed::ChangePassword),
            "RevokeSession" => Some(Deed::RevokeOther),
            "Logout" => self.rng.choice(scopes).map(Deed::Logout),
            _ => None,
        }
    }

    /// Gets ready what the next call needs, with a call that is waited for.
    async fn follow_up(&mut self, method: &str) {
        match method {
            // Whether the answer was lost or there was none, the token is good for
            // another: it is the current one or its direct predecessor.
            "RefreshToken" => {
                self.client.refresh(&self.refresh_token).await;
                // The call that was given up may still come, and after two more refreshes
                // it would be a reuse: the next ones are of another session.
                let login = format!("caller{}", self.number);
                self.client = self.client.logged_in(&login, PASSWORD).await.expect("logged in");
                self.refresh_token.clone_from(&self.client.tokens().refresh_token);
            }
            "DeleteTodo" => self.todos.push(self.client.create_todo("to be deleted").await),
            _ => {}
        }
    }

    /// The call itself. It takes what it needs with it, since nobody may wait for it.
    fn call(
        &mut self,
        method: &'static str,
        victim: Option<(Victim, Deed)>,
        client: Client,
    ) -> impl Future<Output = Result<(), Status>> + Send + 'static {
        let unique = format!("new{}", Uuid::now_v7().simple());
        let unique = unique[..32].to_owned();
        let number = self.number;
        let refresh_token = self.refresh_token.clone();
        let access_token = self.client.tokens().access_token.clone();
        let text = self.rng.u32(..).to_string();
        let changed = Todo { title: text.clone(), description: text.clone(), ..self.todo.clone() };
        let changed = Todo { etag: String::new(), ..changed };
        let todo = if method == "DeleteTodo" { self.todos.pop() } else { None };
        let todo = todo.unwrap_or_else(|| self.todo_that_was_deleted());
        async move {
            match method {
                "CreateUser" => {
                    let email = format!("{unique}@example.com");
                    none(client.try_sign_up(&unique, &email, PASSWORD).await)
                }
                "GetUser" => none(client.try_get_user("me").await),
                "ListUsers" => {
                    let request = ListUsersRequest { page_size: 10, ..<_>::default() };
                    none(client.try_list_users(request).await)
                }
                "UpdateUser" => {
                    let user = me(&format!("caller{number}"), "");
                    none(client.try_update_user(Some(user), None).await)
                }
                "Login" => none(client.try_log_in(REGULAR, PASSWORD).await),
                "RefreshToken" => none(client.try_refresh(&refresh_token).await),
                "ListSessions" => none(client.auth().list_sessions(ListSessionsRequest {}).await),
                "IntrospectToken" => none(client.try_introspect(&access_token).await),
                "CreateTodo" => {
                    let todo = Todo { description: text.clone(), ..titled(&text) };
                    none(client.try_create_todo(Some(todo)).await)
                }
                "GetTodo" => none(client.try_get_todo(&changed.id).await),
                "ListTodos" => {
                    let request = ListTodosRequest { page_size: 10, ..<_>::default() };
                    none(client.try_list_todos(request).await)
                }
                "UpdateTodo" => none(client.try_update_todo(Some(changed), None).await),
                "DeleteTodo" => none(client.try_delete_todo(&todo.id, "").await),
                _ => {
                    let (victim, deed) = victim.expect("all others end something");
                    commit(&client, &victim, deed).await
                }
            }
        }
    }

    /// Nothing that is there, but with a good id.
    fn todo_that_was_deleted(&self) -> Todo {
        Todo { id: Uuid::now_v7().to_string(), ..self.todo.clone() }
    }
}

async fn commit(client: &Client, victim: &Victim, deed: Deed) -> Result<(), Status> {
    match deed {
        Deed::DeleteUser => none(client.try_delete_user("me", "").await),
        Deed::ChangePassword => none(client.try_change_password(PASSWORD, NEW).await),
        Deed::RevokeOther => none(client.try_revoke(&victim.other.to_string()).await),
        Deed::Logout(scope) => none(client.try_log_out(scope.into()).await),
    }
}

/// Answers of all methods in one type.
fn none<T>(answer: Answer<T>) -> Result<(), Status> {
    answer.map(drop)
}

/// The deadline has passed: the server says the one, the client's own clock the other.
fn is_late(refused: &Status) -> bool {
    let by_client = std::error::Error::source(refused).is_some_and(|source| {
        source.is::<tonic::TimeoutExpired>() || source.is::<TransportError>()
    });
    refused.code() == Code::DeadlineExceeded || (refused.code() == Code::Cancelled && by_client)
}

async fn nothing_is_open(app: &App) {
    let busy = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'fast-zero' and (
            state is distinct from 'idle'
            or exists (select from pg_locks where pg_locks.pid = pg_stat_activity.pid)
        )";
    eventually("no connection is busy or holds a lock", async || {
        app.select::<i64>(busy).await == 0
    })
    .await;
    let open = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'fast-zero'";
    let most = i64::from(config().database_max_connections) + 1;
    let open = app.select::<i64>(open).await;
    assert!((1..=most).contains(&open), "{open} connections, of which health has one");
}

/// Calls of which each needs a connection at the same time: none has leaked, and none is
/// left in a transaction that would hide from others what it writes.
async fn every_connection_can_be_used(app: &App) {
    let connections = config().database_max_connections;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold("select from users where username = 'ana' for update").await;
    let calls = (0..connections).map(|_| {
        let ana = ana.clone();
        async move { ana.update_user(me("ana", ""), None).await }
    });
    let calls = tokio::spawn(at_once(calls.collect::<Vec<_>>()));
    lock.until_queue_of(connections.into()).await;
    lock.release().await;
    calls.await.expect("updated");
    let version = "select version from users where username = 'ana'";
    assert_eq!(app.select::<i64>(version).await, 1 + i64::from(connections));
}

async fn every_place_in_the_hashing_queue_is_free(app: &App) {
    // Hashes that nobody waits for may still be made.
    eventually("as many logins as there are places are admitted, and no more", async || {
        // They take their places, and come no further than the first statement.
        let lock = app.hold("lock table users in access exclusive mode").await;
        let calls = (0..=HASHING_PLACES).map(|number| {
            // Of one account, most would wait before they take a place.
            let (anonymous, login) = (app.anonymous(), format!("caller{}", number % CALLERS));
            async move { anonymous.try_log_in(&login, PASSWORD).await }
        });
        let mut logins: JoinSet<_> = calls.collect();
        let first = logins.join_next().await.expect("there are some").expect("no panic");
        assert!(first.is_err(), "none can be answered");
        lock.release().await;
        let rest = logins.join_all().await;
        if rest.iter().all(Result::is_ok) {
            assert_refused(first, Code::ResourceExhausted, "OVERLOADED");
            return true;
        }
        false
    })
    .await;
}

/// A round of calls that are waited for, more at once than there are connections.
async fn every_method_works(app: &App) {
    let users = (0..4 * config().database_max_connections).map(|n| {
        let (anonymous, name) = (app.anonymous(), format!("late{n}"));
        async move {
            anonymous.sign_up(&name, &format!("{name}@example.com"), PASSWORD).await;
            let user = anonymous.logged_in(&name, PASSWORD).await.expect("logged in");
            let other = anonymous.logged_in(&name, PASSWORD).await.expect("logged in");
            user.get_user("me").await;
            assert_eq!(user.list_users(<_>::default()).await.users.len(), 100);
            user.update_user(me(&name, ""), None).await;
            user.refresh(&user.tokens().refresh_token).await;
            assert_eq!(user.list_sessions().await.len(), 2);
            user.try_revoke(&other.tokens().session_id).await.expect("revoked");
            assert!(!other.is_alive().await);
            user.change_password(PASSWORD, NEW).await;
            assert!(user.introspect(&user.tokens().access_token).await.active);
            let todo = user.create_todo("a").await;
            user.update_todo(Todo { title: "b".into(), ..todo.clone() }, None).await;
            assert_eq!(user.get_todo(&todo.id).await.title, "b");
            assert_eq!(user.all_todos(<_>::default()).await.len(), 1);
            user.try_delete_todo(&todo.id, "").await.expect("deleted");
            user.log_out(LogoutScope::AllSessions).await;
            let user = anonymous.logged_in(&name, NEW).await.expect("logged in");
            user.try_delete_user("me", "").await.expect("deleted");
        }
    });
    in_time("a round of calls", at_once(users.collect::<Vec<_>>())).await;
}

async fn no_write_is_half_done(app: &App, stage: &Stage) {
    let left = what_is_left(app).await;
    let left = |victim: &Victim| left.get(&victim.user).cloned();
    let used = stage.used.lock().expect("no panic").clone();
    let unused = stage.victims.lock().expect("no panic").clone();
    let (mut done, mut undone) = (0, 0);
    for (victim, deed, answered) in &used {
        let left = left(victim);
        if left == victim.after(*deed) {
            done += usize::from(!answered);
        } else {
            assert!(!answered, "{deed:?} was answered, but left {left:?}");
            assert_eq!(left, Some(victim.untouched()), "{deed:?} was done by half");
            undone += 1;
        }
    }
    println!("of the calls that end something and were given up, {done} did and {undone} did not");
    for victim in &unused {
        assert_eq!(left(victim), Some(victim.untouched()), "nobody touched it");
    }
    // A login that opens a session also ends the oldest of too many.
    let sessions = "select count(*) from sessions join users on users.id = user_id
        where username = 'regular'";
    assert_eq!(app.select::<i64>(sessions).await, MAX_SESSIONS);
    // Both are always set to the same.
    let torn = "select count(*) from todos join users on users.id = owner_id
        where username like 'caller%' and title <> description
            and (title, description) not in (('0', ''), ('to be deleted', ''))";
    assert_eq!(app.select::<i64>(torn).await, 0);
}

async fn what_is_left(app: &App) -> HashMap<Uuid, Left> {
    let rows: Vec<(Uuid, i64, Vec<Uuid>, i64)> = sqlx::query_as(
        "select id, password_version,
             array(select sessions.id from sessions where user_id = users.id),
             (select count(*) from todos where owner_id = users.id)
         from users",
    )
    .fetch_all(&mut app.sql().await)
    .await
    .expect("listed");
    let left = |(id, version, sessions, todos): (_, _, Vec<_>, _)| {
        (id, (version, sessions.into_iter().collect(), todos))
    };
    rows.into_iter().map(left).collect()
}
