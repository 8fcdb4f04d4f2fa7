//! One measurement: a server of its own, calls, and what they took.

use std::{env, path::PathBuf, sync::Arc, time::Duration};

use fast_zero::proto::todo::v1::{GetTodoRequest, ListTodosResponse, Todo};
use tokio::{process::Command, time::timeout};
use uuid::Uuid;

use crate::{
    Result,
    client::Client,
    fill::{self, Fill},
    load::{self, Pace, Tally},
    postgres::{Database, Postgres},
    process::{self, Server, Stat},
    scenario::{self, CALLERS, Scenario, World},
};

/// Beyond what calls may take that are under way at the end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The service's settings that could lead it elsewhere, or have callers do more.
const UNWANTED: [&str; 8] = [
    "DATABASE_URL_FILE",
    "SECRET_KEY_FILE",
    "SECRET_KEY_PREVIOUS",
    "SECRET_KEY_PREVIOUS_FILE",
    "METRICS_ADDR",
    "TLS_CERT_FILE",
    "TLS_KEY_FILE",
    "TLS_CLIENT_CA_FILE",
];

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    Service,
    Floor,
}

/// Where servers come from.
pub struct Servers {
    /// The service's binary.
    pub binary: PathBuf,
    /// Of the run.
    pub folder: PathBuf,
    secret_key: String,
}

impl Servers {
    pub fn new(binary: PathBuf, folder: PathBuf) -> Self {
        let secret_key = [Uuid::now_v7(), Uuid::now_v7()].map(|id| id.to_string()).concat();
        Self { binary, folder, secret_key }
    }

    pub async fn start(&self, contender: Contender, database: &Database) -> Result<Server> {
        let mut command = match contender {
            Contender::Service => process::leashed(&self.binary)?,
            Contender::Floor => {
                let mut command = process::leashed(env::current_exe()?)?;
                command.arg("floor");
                command
            }
        };
        self.configure(&mut command, database);
        Server::start(command, &self.folder.join("server.log")).await
    }

    fn configure(&self, command: &mut Command, database: &Database) {
        for variable in UNWANTED {
            command.env_remove(variable);
        }
        command
            // Away from a `.env`.
            .current_dir(&self.folder)
            .env("DATABASE_URL", &database.url)
            .env("SECRET_KEY", &self.secret_key)
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("LOG_FORMAT", "json")
            // A day: longer than any run.
            .env("ACCESS_TOKEN_EXPIRE_MINUTES", "1440")
            // All come from one address.
            .env("SIGN_UPS_PER_PEER_PER_MINUTE", "1000000")
            .env("MAX_CONNECTIONS_PER_PEER", "2048");
    }
}

/// A database with its rows, and what callers know of it.
#[derive(Clone)]
pub struct Site {
    pub database: Database,
    pub fill: Fill,
    pub world: Arc<World>,
}

impl Site {
    /// Has the service make the tables and a password's hash, fills them, and logs the
    /// callers in. Walks to a late page of the long list if that is wanted.
    pub async fn prepare(
        servers: &Servers,
        database: Database,
        fill: Fill,
        walks: bool,
    ) -> Result<Self> {
        let server = servers.start(Contender::Service, &database).await?;
        let mut client = Client::connect(&server.address).await?;
        client.users.create_user(scenario::new_user("first")).await?;
        drop(client);
        let sql = database.connect().await?;
        let hash = "delete from users returning password_hash";
        let hash: String = sql.query_one(hash, &[]).await?.get(0);
        drop(sql);
        fill::fill(&database, fill, &hash).await?;
        // A connection that was quiet for so long would have been ended.
        let mut client = Client::connect(&server.address).await?;
        let mut world = World::enter(&mut client, fill).await?;
        if walks {
            world.walk_to(&mut client, fill.late_page()).await?;
        }
        drop(client);
        server.stop().await?;
        Ok(Self { database, fill, world: Arc::new(world) })
    }
}

/// How a measurement goes.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub scenario: Scenario,
    pub contender: Contender,
    pub connections: u16,
    pub pace: Pace,
    pub warm_up: Duration,
    pub duration: Duration,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Sample {
    pub plan: Plan,
    pub tally: Tally,
    /// CPU time of the server, of PostgreSQL (if that is on this machine), and of the
    /// callers.
    pub server_cpu: Duration,
    pub postgres_cpu: Option<Duration>,
    pub client_cpu: Duration,
    /// Of all else on this machine; with PostgreSQL, if that is not told from it.
    pub other_cpu: Duration,
    /// Of the server, with all connections open, in bytes.
    pub resident: u64,
    /// Transactions of all the server's life, and all calls in it.
    transactions: i64,
    calls: u64,
}

impl Sample {
    /// CPU time of a call in the server and in PostgreSQL, in seconds.
    pub fn cpu(&self) -> Option<f64> {
        Some(self.per_call(self.server_cpu + self.postgres_cpu?))
    }

    /// A call's share of some time, in seconds.
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
    pub fn per_call(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.tally.all() as f64
    }

    /// A latency, in seconds.
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
    pub fn latency(&self, quantile: f64) -> f64 {
        self.tally.latencies.value_at_quantile(quantile) as f64 / 1e9
    }
}

/// CPU times at one moment.
struct Cpu {
    server: Duration,
    postgres: Option<Duration>,
    client: Duration,
    machine: Duration,
}

impl Cpu {
    fn since(&self, before: &Self) -> Self {
        let postgres = self.postgres.zip(before.postgres);
        Self {
            server: self.server.saturating_sub(before.server),
            postgres: postgres.map(|(now, before)| now.saturating_sub(before)),
            client: self.client.saturating_sub(before.client),
            machine: self.machine.saturating_sub(before.machine),
        }
    }

    fn now(server: &Server, postgres: &Postgres) -> Result<Self> {
        let client = i32::try_from(std::process::id())?;
        Ok(Self {
            server: Stat::of(server.pid)?.own,
            postgres: postgres.cpu()?,
            client: Stat::of(client)?.own,
            machine: process::cpu_of_machine()?,
        })
    }
}

/// How many statements a call makes of a server that is warm: those of a life with the
/// measurement, less those of one that ends after the warm-up. Among them are the few that
/// the server makes by itself meanwhile. PostgreSQL counts transactions, which each
/// statement outside of one is.
#[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
pub async fn statements(
    servers: &Servers,
    postgres: &Postgres,
    site: &Site,
    sample: &Sample,
) -> Result<f64> {
    let plan = Plan { duration: Duration::ZERO, ..sample.plan };
    let cold = measure(servers, postgres, site, plan).await?;
    let calls = sample.calls.saturating_sub(cold.calls).max(1);
    Ok((sample.transactions - cold.transactions) as f64 / calls as f64)
}

/// Measures a server that is started for it and stopped after it, so that what it has
/// asked of PostgreSQL can be told.
pub async fn measure(
    servers: &Servers,
    postgres: &Postgres,
    site: &Site,
    plan: Plan,
) -> Result<Sample> {
    let before = postgres.transactions(&site.database).await?;
    let server = servers.start(plan.contender, &site.database).await?;
    let limit = plan.warm_up + plan.duration + PATIENCE;
    let called = timeout(limit, call(&server, postgres, site, plan)).await;
    let mut sample = called
        .map_err(Into::into)
        .and_then(|called| called)
        .map_err(|error| format!("{}: {error}\n{}", plan.scenario, server.last_words()))?;
    server.stop().await?;
    sample.transactions = postgres.transactions(&site.database).await? - before;
    Ok(sample)
}

async fn call(server: &Server, postgres: &Postgres, site: &Site, plan: Plan) -> Result<Sample> {
    let mut clients = Vec::new();
    for _ in 0..plan.connections {
        clients.push(Client::connect(&server.address).await?);
    }
    let Plan { scenario, pace, .. } = plan;
    let warm_up = load::run(&clients, &site.world, scenario, pace, plan.warm_up).await?;
    let before = Cpu::now(server, postgres)?;
    let tally = load::run(&clients, &site.world, scenario, pace, plan.duration).await?;
    let cpu = Cpu::now(server, postgres)?.since(&before);
    let ours = cpu.server + cpu.postgres.unwrap_or_default() + cpu.client;
    Ok(Sample {
        plan,
        server_cpu: cpu.server,
        postgres_cpu: cpu.postgres,
        client_cpu: cpu.client,
        other_cpu: cpu.machine.saturating_sub(ours),
        resident: process::resident(server.pid)?,
        transactions: 0,
        calls: warm_up.all() + tally.all(),
        tally,
    })
}

/// Both answer the same, but for times, new ids, and what a page token is made of.
pub async fn check_answers(servers: &Servers, site: &Site) -> Result<()> {
    let mut answers = Vec::new();
    for contender in [Contender::Service, Contender::Floor] {
        let server = servers.start(contender, &site.database).await?;
        let given = ask(&server, &site.world).await;
        answers.push(given.map_err(|error| format!("{contender:?}: {error}"))?);
        server.stop().await?;
    }
    let differing = answers[0].iter().zip(&answers[1]).find(|(service, floor)| service != floor);
    match differing {
        Some((service, floor)) => {
            Err(format!("the floor answers otherwise: {floor:?}, not {service:?}").into())
        }
        None => Ok(()),
    }
}

/// What is compared.
async fn ask(server: &Server, world: &World) -> Result<Vec<Todo>> {
    let todos = &mut Client::connect(&server.address).await?.todos;
    let says = |id| world.first_caller_says(GetTodoRequest { id });
    let id = world.todo_of_first_caller();
    let one = |todo: Option<Todo>| todo.ok_or("the answer has no to-do");
    let found = one(todos.get_todo(says(id.clone())).await?.into_inner().todo)?;
    let mut all = vec![found.clone()];
    for (title, pages) in [("", 3), (fill::RARE, 1)] {
        let mut page_token = String::new();
        for _ in 0..pages {
            let request = world.first_caller_says(scenario::list_of(title, &page_token));
            let listed: ListTodosResponse = todos.list_todos(request).await?.into_inner();
            all.extend(listed.todos);
            // That the list goes on, if not how.
            let goes_on = !listed.next_page_token.is_empty();
            all.push(Todo { state: i32::from(goes_on), ..Todo::default() });
            page_token = listed.next_page_token;
        }
    }
    let created = todos.create_todo(world.first_caller_says(scenario::new_todo())).await?;
    let created = one(created.into_inner().todo)?;
    let change = Todo { state: 5 - created.state, ..created.clone() };
    let update = scenario::update_of_state(change);
    let changed = todos.update_todo(world.first_caller_says(update)).await?.into_inner();
    for todo in [created, one(changed.todo)?] {
        let timeless = todo.create_time.is_some() && todo.update_time.is_some();
        all.push(Todo { id: timeless.to_string(), create_time: None, update_time: None, ..todo });
    }
    Ok(all)
}

/// What a small table holds: as many as fill a page of each caller's, and little more.
pub const SMALL: Fill = Fill { users: CALLERS + 1, todos: 1_000 };
