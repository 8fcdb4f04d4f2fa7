//! The real binary handles any call, valid or invalid, as the API specifies, and no call affects
//! other clients.

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

/// The method and the code of each call.
struct Outcomes(Vec<(String, Code)>);

impl Outcomes {
    /// Returns the number of calls with this code, of one method or of all.
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
    raw: RawClient,
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
        let raw = RawClient::connect(address).await;
        anonymous.sign_up("bystander", "bystander@example.com", PASSWORD).await;
        let client = anonymous.logged_in("bystander", PASSWORD).await.expect("logged in");
        let todo = client
            .create_todo_with(Todo { description: "Mine".into(), ..todo_titled("one") })
            .await;
        let bystander = Bystander { raw: raw.clone().with_token_of(&client), client, todo };
        Self { seed, server, _database: database, anonymous, raw, bystander }
    }

    fn runner(&self) -> TestRunner {
        let seed: Vec<_> = std::iter::repeat_n(self.seed.to_le_bytes(), 4).flatten().collect();
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        TestRunner::new_with_rng(ProptestConfig::default(), rng)
    }

    /// Makes `rounds` calls of each method.
    async fn run(mut self, rounds: usize) -> Outcomes {
        let mut runner = self.runner();
        let mut caller = Caller::sign_up(&self.anonymous).await;
        let mut outcomes = Outcomes(Vec::new());
        let methods = methods();
        for method in std::iter::repeat_n(&methods, rounds).flatten() {
            let call = any_call(method, &caller).new_tree(&mut runner).expect("a call").current();
            // Another client address each time, so that wrong passwords cause no lockout.
            let [.., high, low] = outcomes.0.len().to_be_bytes();
            let raw =
                self.raw.clone().with_metadata("x-forwarded-for", format!("10.0.{high}.{low}"));
            let (result, ()) = tokio::join!(call.send(&raw), self.bystander.is_unaffected());
            if let Err(fault) = call.check(&result) {
                let (seed, output) = (self.seed, self.server.output());
                panic!("{fault}\nFUZZ_SEED={seed}\n{call:#?}\n{result:?}\n{output}");
            }
            if !caller.is_intact(&call, &result).await {
                caller = Caller::sign_up(&self.anonymous).await;
            }
            let code = result.err().map_or(Code::Ok, |status| status.code());
            outcomes.0.push((method.name.clone(), code));
        }
        self.ends_well().await;
        outcomes
    }

    async fn ends_well(&mut self) {
        self.server.signal(Signal::SIGTERM);
        assert!(self.server.wait().await.success(), "{}", self.server.output());
        self.server.wait_for_line("\"stopped\"").await;
        for fault in ["panicked", "\"ERROR\"", "internal error"] {
            assert!(!self.server.output().contains(fault), "{}", self.server.output());
        }
    }
}

#[tokio::test]
async fn any_call_of_health_or_reflection_is_handled_and_affects_no_other() {
    let mut fuzz = Fuzz::start().await;
    let mut runner = fuzz.runner();
    // A Watch would not end without a deadline.
    let raw = fuzz.raw.clone().with_metadata("grpc-timeout", "50m");
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
        let call = raw.call(&method.path, &bytes);
        let (result, ()) = tokio::join!(call, fuzz.bystander.is_unaffected());
        let code = match &result {
            Ok(_) => Code::Ok,
            // Reflection returns this for unreadable and for oversized requests.
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
        assert!(is_allowed, "FUZZ_SEED={} {} {sent}: {result:?}", fuzz.seed, method.path);
    }
    fuzz.ends_well().await;
}

#[tokio::test]
async fn any_call_is_handled_as_specified_and_affects_no_other() {
    let outcomes = Fuzz::start().await.run(8).await;
    for code in [Code::Ok, Code::InvalidArgument, Code::Unauthenticated, Code::Internal] {
        assert!(outcomes.count(code, None) > 0, "{code:?} is missing: {:?}", outcomes.0);
    }
}

/// Makes many more calls and prints their outcomes. `FUZZ_SEED` repeats the calls of an earlier
/// run, except for ids and times.
#[tokio::test]
#[ignore = "takes minutes"]
async fn any_of_many_calls_is_handled_as_specified() {
    let fuzz = Fuzz::start().await;
    print_line(&format!("FUZZ_SEED={}", fuzz.seed));
    let outcomes = fuzz.run(500).await;
    print_line(&format!("{} calls", outcomes.0.len()));
    let methods = methods();
    for code in (0..=16).map(Code::from).filter(|code| outcomes.count(*code, None) > 0) {
        let of = |method: &Method| outcomes.count(code, Some(&method.name));
        let each = methods.iter().map(|method| format!("{} {}", method.name, of(method)));
        let each = each.collect::<Vec<_>>().join(", ");
        print_line(&format!("{code:?} {}: {each}", outcomes.count(code, None)));
    }
    for Method { name, .. } in &methods {
        let answered = outcomes.count(Code::Ok, Some(name));
        assert!(answered > 0, "{name} never succeeded: nothing was tried behind its checks");
    }
}
