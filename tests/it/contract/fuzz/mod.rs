//! Any call to the real binary, good or bad, is answered or refused as the contract says,
//! and hurts nobody else.

mod call;
mod caller;

use fast_zero::proto::todo::v1::Todo;
use nix::sys::signal::Signal;
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use prost::Message;
use prost_reflect::DynamicMessage;
use tonic::Code;
use uuid::Uuid;

use self::{
    call::any_call,
    caller::{Bystander, Caller},
};
use crate::support::{
    Client, PASSWORD,
    app::connect,
    messages::{KnownValues, Method, any_bytes, any_message, methods, system_methods},
    postgres::{TestDatabase, print_line},
    process::{Binary, Process},
    raw_client::RawClient,
    todos::todo_titled,
};

/// The method of each call, and how it ended.
struct Figures(Vec<(String, Code)>);

impl Figures {
    /// How many calls ended in this way; of all methods, or of one.
    fn count(&self, code: Code, method: Option<&str>) -> usize {
        let is_it = |(name, ended): &&(String, Code)| {
            *ended == code && method.is_none_or(|method| method == name)
        };
        self.0.iter().filter(is_it).count()
    }
}

struct Fuzz {
    seed: u64,
    server: Process,
    _database: TestDatabase,
    anonymous: Client,
    wire: RawClient,
    bystander: Bystander,
}

impl Fuzz {
    async fn start() -> Self {
        let seed = std::env::var("FUZZ_SEED").map(|seed| seed.parse().expect("a number"));
        let seed = seed.unwrap_or_else(|_| Uuid::now_v7().as_u64_pair().1);
        let database = TestDatabase::create().await;
        let server = Binary::server(&database.url())
            .env("RUST_LOG", "info,fast_zero::middleware=warn")
            .env("TRUSTED_PROXIES", "127.0.0.0/8")
            .env("SIGN_UPS_PER_PEER_PER_MINUTE", "100000")
            .start();
        let address = server.address().await.parse().expect("an address");
        let anonymous = Client::new(connect(address).await);
        let wire = RawClient::connect(address).await;
        anonymous.sign_up("bystander", "bystander@example.com", PASSWORD).await;
        let client = anonymous.logged_in("bystander", PASSWORD).await.expect("logged in");
        let todo = client
            .create_todo_with(Todo { description: "Mine".into(), ..todo_titled("one") })
            .await;
        let bystander = Bystander { wire: wire.clone().with_token_of(&client), client, todo };
        Self { seed, server, _database: database, anonymous, wire, bystander }
    }

    fn runner(&self) -> TestRunner {
        let seed: Vec<_> = std::iter::repeat_n(self.seed.to_le_bytes(), 4).flatten().collect();
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        TestRunner::new_with_rng(ProptestConfig::default(), rng)
    }

    /// Makes as many calls to each method.
    async fn run(mut self, rounds: usize) -> Figures {
        let mut runner = self.runner();
        let mut caller = Caller::sign_up(&self.anonymous).await;
        let mut figures = Figures(Vec::new());
        let methods = methods();
        for method in std::iter::repeat_n(&methods, rounds).flatten() {
            let call = any_call(method, &caller).new_tree(&mut runner).expect("a call").current();
            // From elsewhere each time, so that wrong passwords lock nobody out.
            let [.., high, low] = figures.0.len().to_be_bytes();
            let wire =
                self.wire.clone().with_metadata("x-forwarded-for", format!("10.0.{high}.{low}"));
            let (answer, ()) = tokio::join!(call.send(&wire), self.bystander.is_left_alone());
            if let Err(fault) = call.check(&answer) {
                let (seed, output) = (self.seed, self.server.output());
                panic!("{fault}\nFUZZ_SEED={seed}\n{call:#?}\n{answer:?}\n{output}");
            }
            if !caller.is_whole(&call, &answer).await {
                caller = Caller::sign_up(&self.anonymous).await;
            }
            let code = answer.err().map_or(Code::Ok, |status| status.code());
            figures.0.push((method.name.clone(), code));
        }
        self.ends_well().await;
        figures
    }

    async fn ends_well(&mut self) {
        self.server.signal(Signal::SIGTERM);
        assert!(self.server.wait().await.success(), "{}", self.server.output());
        self.server.wait_for_line("\"stopped\"").await;
        for bad in ["panicked", "\"ERROR\"", "internal error"] {
            assert!(!self.server.output().contains(bad), "{}", self.server.output());
        }
    }
}

#[tokio::test]
async fn any_call_of_health_or_reflection_is_handled_and_affects_no_other() {
    let mut fuzz = Fuzz::start().await;
    let mut runner = fuzz.runner();
    // A Watch would go on and on.
    let wire = fuzz.wire.clone().with_metadata("grpc-timeout", "50m");
    let services = ["", "fastzero.todo.v1.TodoService", "liveness"].map(str::to_owned).to_vec();
    let symbols = ["fastzero.todo.v1.Todo", "grpc.health.v1.Health", "a"].map(str::to_owned);
    let known =
        KnownValues::from([("service", services), ("file_containing_symbol", symbols.to_vec())]);
    for method in std::iter::repeat_n(&system_methods(), 20).flatten() {
        let bytes = prop_oneof![
            any_message(&method.request, &known).prop_map(|message| message.encode_to_vec()),
            any_bytes(&method.request, &known),
        ];
        let bytes = bytes.new_tree(&mut runner).expect("a call").current();
        let call = wire.call(&method.path, &bytes);
        let (answer, ()) = tokio::join!(call, fuzz.bystander.is_left_alone());
        let code = match &answer {
            Ok(_) => Code::Ok,
            // Reflection says no more to what it cannot read or is too large.
            Err(status) if status.message() == "Missing response message." => Code::Ok,
            Err(status) => status.code(),
        };
        let is_message = DynamicMessage::decode(method.request.clone(), &*bytes).is_ok();
        let is_allowed = match code {
            Code::Internal => !is_message,
            Code::Ok => is_message || method.path.contains("reflection"),
            Code::NotFound | Code::InvalidArgument => is_message,
            code => [Code::OutOfRange, Code::DeadlineExceeded].contains(&code),
        };
        let sent = bytes[..bytes.len().min(200)].escape_ascii();
        assert!(is_allowed, "FUZZ_SEED={} {} {sent}: {answer:?}", fuzz.seed, method.path);
    }
    fuzz.ends_well().await;
}

#[tokio::test]
async fn any_call_is_handled_as_specified_and_affects_no_other() {
    let figures = Fuzz::start().await.run(8).await;
    for code in [Code::Ok, Code::InvalidArgument, Code::Unauthenticated, Code::Internal] {
        assert!(figures.count(code, None) > 0, "{code:?} is missing: {:?}", figures.0);
    }
}

/// The same with many more calls: what they came to is printed. `FUZZ_SEED` makes the
/// calls of an earlier run again, as far as they do not depend on ids and times.
#[tokio::test]
#[ignore = "takes minutes"]
async fn any_of_many_calls_is_handled_as_specified() {
    let fuzz = Fuzz::start().await;
    print_line(&format!("FUZZ_SEED={}", fuzz.seed));
    let figures = fuzz.run(500).await;
    print_line(&format!("{} calls", figures.0.len()));
    let methods = methods();
    for code in (0..=16).map(Code::from).filter(|code| figures.count(*code, None) > 0) {
        let of = |method: &Method| figures.count(code, Some(&method.name));
        let each = methods.iter().map(|method| format!("{} {}", method.name, of(method)));
        let each = each.collect::<Vec<_>>().join(", ");
        print_line(&format!("{code:?} {}: {each}", figures.count(code, None)));
    }
    for Method { name, .. } in &methods {
        let answered = figures.count(Code::Ok, Some(name));
        assert!(answered > 0, "{name} never succeeded: nothing was tried behind its checks");
    }
}
