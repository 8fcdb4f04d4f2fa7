//! The history of an owner: readers that follow changes on two replicas hold every write to which a
//! server has responded, whenever they have caught up.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fast_zero::proto::todo::v1::{SyncTodosRequest, Todo, WatchTodosRequest, WatchTodosResponse};
use fastrand::Rng;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tonic::transport::Channel;

use crate::support::{
    App, Client,
    app::config_with,
    changes::{Copy, to_message},
    random,
};

/// Writers and readers of one owner, each on a random replica at a time.
const WRITERS: usize = 6;
const READERS: usize = 4;

/// Todos that the writers share, so that they compete for each.
const TODOS: usize = 8;

/// A write that a server has responded to: the todo and its version.
type Acknowledged = HashMap<String, i64>;

/// What a run has shown.
#[derive(Debug, Default)]
struct Faults(Mutex<Vec<String>>);

#[derive(Clone)]
struct World {
    client: Client,
    replicas: [Channel; 2],
    acknowledged: Arc<Mutex<Acknowledged>>,
    faults: Arc<Faults>,
    is_over: Arc<AtomicBool>,
    ids: Arc<Vec<String>>,
    /// Whether writers also create and delete todos, which needs the real clocks.
    with_all_writes: bool,
}

fn version(etag: &str) -> i64 {
    etag.parse().expect("an etag is a version")
}

impl World {
    fn client(&self, rng: &mut Rng) -> Client {
        self.client.clone().with_channel(&self.replicas[rng.usize(..self.replicas.len())])
    }

    fn acknowledge(&self, id: &str, version: i64) {
        let mut acknowledged = self.acknowledged.lock().expect("not poisoned");
        let latest = acknowledged.entry(id.to_owned()).or_default();
        *latest = version.max(*latest);
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Makes random writes. Some are cancelled: the server may apply them or not.
    async fn write(self, mut rng: Rng) {
        while !self.is_over() {
            let client = self.client(&mut rng);
            let patience = if rng.u8(..8) == 0 { rng.u64(..5) } else { 5_000 };
            let id = self.ids[rng.usize(..self.ids.len())].clone();
            let kind = rng.u8(..if self.with_all_writes { 5 } else { 1 });
            let write = async {
                match kind {
                    0 | 1 => {
                        let title = format!("{}", rng.u32(..));
                        let todo = Todo { id: id.clone(), title, ..<_>::default() };
                        let updated = client.try_update_todo(Some(todo), None).await.ok()?;
                        Some((id, updated.into_inner().todo?.etag))
                    }
                    2 => {
                        let deleted = client.try_delete_todo(&id, "").await.ok()?;
                        Some((id, deleted.into_inner().deleted?.todo?.etag))
                    }
                    3 => {
                        let restored = client.try_undelete_todo(&id).await.ok()?;
                        Some((id, restored.into_inner().todo?.etag))
                    }
                    _ => {
                        let todo = Todo { title: "new".into(), ..<_>::default() };
                        let created = client.try_create_todo(Some(todo)).await.ok()?;
                        let created = created.into_inner().todo?;
                        Some((created.id, created.etag))
                    }
                }
            };
            if let Ok(Some((id, etag))) = timeout(Duration::from_millis(patience), write).await {
                self.acknowledge(&id, version(&etag));
            }
        }
    }

    /// Follows the changes, by pages and by watches, from either replica.
    async fn read(self, mut rng: Rng) -> Copy {
        let mut copy = Copy::default();
        while !self.is_over() {
            if rng.bool() {
                self.sync(&mut copy, &mut rng).await;
            } else {
                self.watch(&mut copy, &mut rng).await;
            }
            if rng.u8(..50) == 0 {
                copy.cursor.clear();
            }
        }
        copy
    }

    async fn sync(&self, copy: &mut Copy, rng: &mut Rng) {
        for _ in 0..rng.u8(1..10) {
            let before = self.acknowledged.lock().expect("not poisoned").clone();
            let request =
                SyncTodosRequest { cursor: copy.cursor.clone(), page_size: rng.i32(1..20) };
            let Ok(page) = self.client(rng).try_sync_todos(request).await else { return };
            let page = to_message(page.into_inner());
            self.apply(copy, page, &before);
        }
    }

    async fn watch(&self, copy: &mut Copy, rng: &mut Rng) {
        let request = WatchTodosRequest { cursor: copy.cursor.clone(), from_now: false };
        let Ok(stream) = self.client(rng).try_watch_todos(request).await else { return };
        let mut stream = stream.into_inner();
        let until = Instant::now() + Duration::from_millis(rng.u64(..300));
        while let Ok(Ok(Some(message))) = tokio::time::timeout_at(until, stream.message()).await {
            // The server may have read the message before any write that is known by now.
            self.apply(copy, message, &HashMap::new());
        }
    }

    /// Applies a page. If it has caught up, the copy must contain all writes of `before`, and all
    /// acknowledged ones up to its own latest version.
    fn apply(&self, copy: &mut Copy, page: WatchTodosResponse, before: &Acknowledged) {
        let caught_up = page.caught_up;
        copy.apply(page);
        if caught_up {
            let latest = versions(copy).into_values().max().unwrap_or_default();
            let acknowledged = self.acknowledged.lock().expect("not poisoned").clone();
            let known = acknowledged.into_iter().filter(|(_, version)| *version <= latest);
            for (id, version) in known.chain(before.clone()) {
                let held = versions(copy).get(&id).copied().unwrap_or_default();
                if held < version {
                    let fault = format!("{id} at {version}, but the copy holds {held}");
                    self.faults.0.lock().expect("not poisoned").push(fault);
                }
            }
        }
    }
}

/// Returns the version of each todo, and of each deletion.
fn versions(copy: &Copy) -> HashMap<String, i64> {
    let todos = copy.todos.iter().map(|(id, todo)| (id.clone(), version(&todo.etag)));
    let deleted = copy
        .deleted
        .iter()
        .map(|(id, deleted)| (id.clone(), version(&deleted.todo.as_ref().expect("a todo").etag)));
    todos.chain(deleted).collect()
}

/// Runs writers and readers, and returns the faults that the readers saw. At rest, each copy must
/// equal the lists.
async fn run(
    app: &App,
    duration: Duration,
    with_all_writes: bool,
    before: &'static str,
) -> Vec<String> {
    let replica = app.start_replica_with(config_with(|config| {
        config.limits.coalescing = with_all_writes;
    }));
    let replica = replica.await;
    let client = app.signed_up("ana").await;
    let mut ids = Vec::new();
    for number in 0..TODOS {
        ids.push(client.create_todo(&number.to_string()).await.id);
    }
    app.execute(before).await;
    let world = World {
        client,
        replicas: [app.channel.clone(), replica.channel.clone()],
        acknowledged: <_>::default(),
        faults: <_>::default(),
        is_over: <_>::default(),
        ids: Arc::new(ids),
        with_all_writes,
    };
    let seed = random::seed();
    let mut rng = Rng::with_seed(seed);
    let (mut writers, mut readers) = (JoinSet::new(), JoinSet::new());
    for _ in 0..WRITERS {
        writers.spawn(world.clone().write(rng.fork()));
    }
    for _ in 0..READERS {
        readers.spawn(world.clone().read(rng.fork()));
    }
    let until = Instant::now() + duration;
    while Instant::now() < until && world.faults.0.lock().expect("not poisoned").is_empty() {
        sleep(Duration::from_millis(100)).await;
    }
    world.is_over.store(true, Ordering::Relaxed);
    writers.join_all().await;
    let written = world.acknowledged.lock().expect("not poisoned").len();
    assert!(written >= TODOS, "{written} todos were written");
    let todos = world.client.list_all_todos(<_>::default()).await;
    let mut faults = world.faults.0.lock().expect("not poisoned").clone();
    for mut copy in readers.join_all().await {
        copy.sync(&world.client, 1_000).await;
        let copied: Vec<_> = copy.todos.into_values().collect();
        if copied != todos {
            faults.push(format!("at rest, {copied:?} differs from {todos:?}"));
        }
    }
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_have_caught_up_hold_every_acknowledged_write() {
    let app = App::start().await;
    let faults = run(&app, Duration::from_secs(5), true, "").await;
    assert_eq!(faults, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes ten minutes"]
async fn readers_hold_every_acknowledged_write_for_ten_minutes() {
    let app = App::start().await;
    let faults = run(&app, Duration::from_mins(10), true, "").await;
    assert_eq!(faults, Vec::<String>::new());
}

/// The clock as a sequence: numbers become visible before the writes that have them, and the writes
/// do not wait for each other.
const SEQUENCE: &str = "
    alter table todos drop constraint todos_clock_fkey;
    alter table todo_trash drop constraint todo_trash_clock_fkey;
    create sequence tick;
    select setval('tick', (select max(version) from todo_clocks) + 1);
    alter table todo_clocks rename to old_clocks;
    create view todo_clocks as
        select id as owner_id, (select last_value from tick) as version from users;
    create function next_tick() returns trigger language plpgsql as $$
        begin
            new.version := nextval('tick');
            return new;
        end $$;
    create trigger next_tick instead of update on todo_clocks
        for each row execute function next_tick();";

/// Proves that the tests above would notice a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_sequence_instead_of_the_clock_readers_miss_writes() {
    // The batched update locks rows of the clocks, which a view does not have.
    let app = App::start_with(config_with(|config| config.limits.coalescing = false)).await;
    let faults = run(&app, Duration::from_mins(1), false, SEQUENCE).await;
    assert_ne!(faults, Vec::<String>::new());
}
