//! Any call to the real binary, good or bad, is answered or refused as the contract says,
//! and hurts nobody else.

use std::fmt;

use fast_zero::proto::{
    error::v1::ErrorReason,
    todo::v1::{GetTodoRequest, GetTodoResponse, ListTodosRequest, Todo},
    user::v1::ListUsersRequest,
};
use nix::sys::signal::Signal;
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    strategy::ValueTree,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use prost::Message;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor};
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    contract::PUBLIC,
    support::{
        Client, PASSWORD,
        app::{connect, unique},
        messages::{Known, Method, any_bytes, any_message, methods, open_methods},
        postgres::{TestDatabase, tell},
        process::{Process, Run},
        todos::{Answer, titled},
        tokens::{Jwt, quoted},
        wire::Wire,
    },
};

const GET_TODO: &str = "/fastzero.todo.v1.TodoService/GetTodo";

type Metadatum = MetadataValue<Ascii>;

/// What is sent.
#[derive(Clone)]
struct Call {
    method: Method,
    bytes: Vec<u8>,
    authorization: Authorization,
    timeout: Option<Metadatum>,
    request_id: Option<Metadatum>,
    user_agent: Option<Metadatum>,
}

#[derive(Clone, Debug)]
struct Authorization {
    values: Vec<Metadatum>,
    is_good: bool,
}

impl fmt::Debug for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct(&self.method.path)
            .field("bytes", &self.bytes.escape_ascii().to_string())
            .field("message", &self.message())
            .field("authorization", &self.authorization)
            .field("grpc-timeout", &self.timeout)
            .field("x-request-id", &self.request_id)
            .field("user-agent", &self.user_agent)
            .finish()
    }
}

fn metadatum(bytes: impl AsRef<[u8]>) -> Metadatum {
    MetadataValue::try_from(bytes.as_ref()).expect("a metadata value")
}

/// Whatever may stand in a header.
fn any_metadatum() -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![4 => 0x20_u8..0x7f, 1 => 0x80_u8..=0xff, 1 => Just(b'\t')], 0..300)
}

fn any_authorization(client: &Client) -> BoxedStrategy<Authorization> {
    let token = client.tokens().access_token.clone();
    let jwt = Jwt::for_session_of(client);
    let good = format!("Bearer {token}");
    let bad = |values: Vec<Vec<u8>>| Authorization {
        values: values.into_iter().map(metadatum).collect(),
        is_good: false,
    };
    let twice = vec![good.clone().into_bytes(); 2];
    // Claims of the right kind only by chance, signed as the service signs them.
    let claim = (
        select(&["iss", "aud", "sub", "sid", "exp", "nbf", "typ", "alg"][..]),
        prop_oneof![
            "[ -~&&[^\"\\\\]]{0,20}".prop_map(|text| quoted(&text)),
            select(&["null", "[]", "{}", "true", "1e400", "-1"][..]).prop_map(str::to_owned),
            (0..1_000_i64).prop_map(|number| number.to_string()),
        ],
    );
    let signed = claim.prop_map(move |(name, json)| {
        let jwt = jwt.clone();
        let jwt = match name {
            "typ" | "alg" => jwt.header(name, json),
            // A beginning in the past does no harm.
            "nbf" => jwt.claim("exp", "0").claim("nbf", json),
            _ => jwt.claim(name, json),
        };
        vec![format!("Bearer {}", jwt.signed()).into_bytes()]
    });
    let cut =
        (0..token.len()).prop_map(move |at| vec![format!("Bearer {}", &token[..at]).into_bytes()]);
    prop_oneof![
        10 => Just(Authorization { values: vec![metadatum(good)], is_good: true }),
        1 => Just(Authorization { values: Vec::new(), is_good: false }),
        1 => Just(twice).prop_map(bad),
        1 => vec(any_metadatum(), 1..3).prop_map(bad),
        1 => any_metadatum().prop_map(|rest| vec![[b"Bearer ", &rest[..]].concat()]).prop_map(bad),
        1 => cut.prop_map(bad),
        2 => signed.prop_map(bad),
    ]
    .boxed()
}

/// An entry that is left out more often than not.
fn perhaps(value: impl Strategy<Value = Vec<u8>> + 'static) -> BoxedStrategy<Option<Metadatum>> {
    prop_oneof![2 => Just(None), 1 => value.prop_map(|bytes| Some(metadatum(bytes)))].boxed()
}

fn any_timeout() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[1-9]S|[5-9][0-9]{3}m|99999999H".prop_map(String::into_bytes),
        1 => "0{0,7}[0-9][HMSmun]|[0-9]{1,8}[un]".prop_map(String::into_bytes),
        1 => "[0-9]{0,9}[ -~]{0,2}".prop_map(String::into_bytes),
        1 => any_metadatum(),
    ]
}

fn any_request_id() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof!["[!-~]{1,128}".prop_map(String::into_bytes), any_metadatum()]
}

fn any_call(method: &Method, caller: &Caller) -> BoxedStrategy<Call> {
    let message = any_message(&method.request, &caller.known);
    let bytes = prop_oneof![
        3 => message.prop_map(|message| message.encode_to_vec()),
        1 => any_bytes(&method.request, &caller.known),
    ];
    let method = method.clone();
    (
        bytes,
        any_authorization(&caller.client),
        perhaps(any_timeout()),
        perhaps(any_request_id()),
        perhaps(any_metadatum()),
    )
        .prop_map(move |(bytes, authorization, timeout, request_id, user_agent)| {
            let method = method.clone();
            Call { method, bytes, authorization, timeout, request_id, user_agent }
        })
        .boxed()
}

/// How long a call may take by its metadata.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deadline {
    Long,
    Short,
    Malformed,
}

impl Call {
    fn message(&self) -> Result<DynamicMessage, prost::DecodeError> {
        DynamicMessage::decode(self.method.request.clone(), &*self.bytes)
    }

    async fn send(&self, wire: &Wire) -> Answer<Vec<u8>> {
        let mut wire = wire.clone();
        for value in &self.authorization.values {
            wire = wire.with_value("authorization", value.clone());
        }
        for (key, value) in [
            ("grpc-timeout", &self.timeout),
            ("x-request-id", &self.request_id),
            ("user-agent", &self.user_agent),
        ] {
            if let Some(value) = value {
                wire = wire.with_value(key, value.clone());
            }
        }
        wire.call(&self.method.path, &self.bytes).await
    }

    fn deadline(&self) -> Deadline {
        let Some(value) = &self.timeout else {
            return Deadline::Long;
        };
        let nanoseconds = value.as_encoded_bytes().split_last().and_then(|(unit, digits)| {
            let is_count = (1..=8).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
            let count: u128 =
                std::str::from_utf8(digits).ok()?.parse().ok().filter(|_| is_count)?;
            let units = [(b'H', 3_600_000_000_000), (b'M', 60_000_000_000), (b'S', 1_000_000_000)];
            let units = units.into_iter().chain([(b'm', 1_000_000), (b'u', 1_000), (b'n', 1)]);
            units.into_iter().find(|(name, _)| name == unit).map(|(_, unit)| count * unit)
        });
        match nanoseconds {
            None => Deadline::Malformed,
            Some(5_000_000_000..) => Deadline::Long,
            Some(_) => Deadline::Short,
        }
    }

    /// The codes with which the call may be refused; `None` stands for its answer.
    fn allowed(&self) -> Vec<Option<Code>> {
        let is_public = PUBLIC.contains(&&*self.method.path);
        let mut allowed: Vec<_> = if !is_public && !self.authorization.is_good {
            [Code::Unauthenticated].map(Some).into()
        } else if self.deadline() == Deadline::Malformed {
            [Code::InvalidArgument].map(Some).into()
        } else if self.message().is_err() {
            [Code::Internal].map(Some).into()
        } else {
            let refused = [
                Code::InvalidArgument,
                Code::NotFound,
                Code::PermissionDenied,
                Code::AlreadyExists,
                Code::Aborted,
                Code::Unauthenticated,
                Code::ResourceExhausted,
            ];
            refused.into_iter().map(Some).chain([None]).collect()
        };
        if self.deadline() == Deadline::Short {
            allowed.push(Some(Code::DeadlineExceeded));
        }
        allowed
    }

    /// Says what is wrong with what came back.
    fn check(&self, answer: &Answer<Vec<u8>>) -> Result<(), String> {
        let code = answer.as_ref().err().map(Status::code);
        let allowed = self.allowed();
        if !allowed.contains(&code) {
            return Err(format!("{code:?} is none of {allowed:?}"));
        }
        match answer {
            Ok(response) => {
                let message =
                    DynamicMessage::decode(self.method.response.clone(), &**response.get_ref());
                let message = message.map_err(|error| format!("the answer: {error}"))?;
                let is_known = message.unknown_fields().count() == 0;
                is_known.then_some(()).ok_or_else(|| format!("the answer has more: {message:?}"))
            }
            Err(status) => self.check_details(status),
        }
    }

    fn check_details(&self, status: &Status) -> Result<(), String> {
        let details = status.get_error_details();
        let info = details.error_info().ok_or("no ErrorInfo")?;
        let reason = format!("ERROR_REASON_{}", info.reason);
        if info.domain != "fastzero" || ErrorReason::from_str_name(&reason).is_none() {
            return Err(format!("nobody knows {reason} of {}", info.domain));
        }
        let named = details.request_info().map(|info| info.request_id.as_bytes());
        let returned = status.metadata().get("x-request-id").map(MetadataValue::as_encoded_bytes);
        let sent = self.request_id.as_ref().map(MetadataValue::as_encoded_bytes);
        let is_one =
            |id: &&[u8]| (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
        if !named.as_ref().is_some_and(is_one)
            || named != returned
            || sent.filter(is_one).is_some_and(|id| named != Some(id))
        {
            return Err(format!("the request's id is {named:?}, {returned:?}"));
        }
        if status.code() == Code::InvalidArgument {
            let violations = details.bad_request().map(|bad| &*bad.field_violations);
            let violations = violations.unwrap_or_default();
            let is_field =
                |path: &str| path == "grpc-timeout" || has_field(&self.method.request, path);
            if violations.is_empty() || !violations.iter().all(|bad| is_field(&bad.field)) {
                return Err(format!("the fields at fault are {violations:?}"));
            }
        }
        Ok(())
    }
}

/// Whether messages of this type have a field with this path.
fn has_field(kind: &MessageDescriptor, path: &str) -> bool {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    match (kind.get_field_by_name(name), rest) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(field), Some(rest)) => {
            matches!(field.kind(), Kind::Message(kind) if has_field(&kind, rest))
        }
    }
}

/// In whose name the calls are made, and what is known of him.
struct Caller {
    client: Client,
    known: Known,
}

impl Caller {
    async fn sign_up(anonymous: &Client) -> Self {
        let username = unique("caller");
        let email = format!("{username}@example.com");
        let user = anonymous.sign_up(&username, &email, PASSWORD).await;
        let mut client = anonymous.logged_in(&username, PASSWORD).await.expect("logged in");
        client.user = Some(user.clone());
        let (one, _) = (client.create_todo("one").await, client.create_todo("two").await);
        let todos = ListTodosRequest { page_size: 1, ..<_>::default() };
        let users = ListUsersRequest { page_size: 1, ..<_>::default() };
        let page_tokens = vec![
            String::new(),
            client.list_todos(todos).await.next_page_token,
            client.list_users(users).await.next_page_token,
        ];
        let tokens = client.tokens().clone();
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        let known = Known::from([
            ("id", vec!["me".into(), user.id, one.id.clone(), one.id, Uuid::now_v7().to_string()]),
            ("session_id", vec![tokens.session_id, Uuid::now_v7().to_string()]),
            ("etag", owned(&["", "", "1", "2"])),
            ("login", vec![username.clone(), email.clone()]),
            ("username", vec![username, unique("new"), unique("new")]),
            ("email", vec![email, format!("{}@example.com", unique("new"))]),
            ("password", vec![PASSWORD.into(), PASSWORD.into(), "another password".into()]),
            ("current_password", vec![PASSWORD.into()]),
            ("new_password", owned(&["another password"])),
            ("access_token", vec![tokens.access_token]),
            ("refresh_token", vec![tokens.refresh_token]),
            ("page_token", page_tokens),
            ("order_by", owned(&["", "title", "update_time desc", "create_time desc"])),
            ("title", owned(&["one", "o", "Ação"])),
            ("description", owned(&["", "two\nlines"])),
            ("paths", owned(&["title", "state", "description", "username", "email", "*"])),
        ]);
        Self { client, known }
    }

    /// Whether calls may still be made in his name and find something.
    async fn is_whole(&self, call: &Call, answer: &Answer<Vec<u8>>) -> bool {
        let is_read =
            ["Get", "List", "Introspect"].iter().any(|read| call.method.name.starts_with(read));
        let has_new_password = call.method.name == "ChangePassword" && answer.is_ok();
        let todo = &self.known["id"][2];
        is_read
            || !has_new_password
                && self.client.is_alive().await
                && self.client.try_get_todo(todo).await.is_ok()
    }
}

/// Somebody else, on the connection of the calls and on another one.
struct Bystander {
    client: Client,
    wire: Wire,
    todo: Todo,
}

impl Bystander {
    async fn is_left_alone(&self) {
        let request = GetTodoRequest { id: self.todo.id.clone() }.encode_to_vec();
        let (there, here) =
            tokio::join!(self.client.get_todo(&self.todo.id), self.wire.call(GET_TODO, &request));
        let here = here.expect("found on the same connection").into_inner();
        let here = GetTodoResponse::decode(&*here).expect("a response");
        assert_eq!((&there, here.todo.as_ref()), (&self.todo, Some(&self.todo)));
    }
}

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
    wire: Wire,
    bystander: Bystander,
}

impl Fuzz {
    async fn start() -> Self {
        let seed = std::env::var("FUZZ_SEED").map(|seed| seed.parse().expect("a number"));
        let seed = seed.unwrap_or_else(|_| Uuid::now_v7().as_u64_pair().1);
        let database = TestDatabase::create().await;
        let server = Run::server(&database.url())
            .env("RUST_LOG", "info,fast_zero::call=warn")
            .env("TRUSTED_PROXIES", "127.0.0.0/8")
            .env("SIGN_UPS_PER_PEER_PER_MINUTE", "100000")
            .start();
        let address = server.address().await.parse().expect("an address");
        let anonymous = Client::new(connect(address).await);
        let wire = Wire::connect(address).await;
        anonymous.sign_up("bystander", "bystander@example.com", PASSWORD).await;
        let client = anonymous.logged_in("bystander", PASSWORD).await.expect("logged in");
        let todo = client.create(Todo { description: "Mine".into(), ..titled("one") }).await;
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
            let wire = self.wire.clone().with("x-forwarded-for", format!("10.0.{high}.{low}"));
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
        assert!(self.server.end().await.success(), "{}", self.server.output());
        self.server.line("\"stopped\"").await;
        for bad in ["panicked", "\"ERROR\"", "internal error"] {
            assert!(!self.server.output().contains(bad), "{}", self.server.output());
        }
    }
}

#[tokio::test]
async fn any_call_of_health_or_reflection_is_answered_or_refused_and_hurts_no_other() {
    let mut fuzz = Fuzz::start().await;
    let mut runner = fuzz.runner();
    // A Watch would go on and on.
    let wire = fuzz.wire.clone().with("grpc-timeout", "50m");
    let services = ["", "fastzero.todo.v1.TodoService", "liveness"].map(str::to_owned).to_vec();
    let symbols = ["fastzero.todo.v1.Todo", "grpc.health.v1.Health", "a"].map(str::to_owned);
    let known = Known::from([("service", services), ("file_containing_symbol", symbols.to_vec())]);
    for method in std::iter::repeat_n(&open_methods(), 20).flatten() {
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
async fn any_call_is_answered_or_refused_as_it_should_be_and_hurts_no_other() {
    let figures = Fuzz::start().await.run(8).await;
    for code in [Code::Ok, Code::InvalidArgument, Code::Unauthenticated, Code::Internal] {
        assert!(figures.count(code, None) > 0, "{code:?} is missing: {:?}", figures.0);
    }
}

/// The same with many more calls: what they came to is printed. `FUZZ_SEED` makes the
/// calls of an earlier run again, as far as they do not depend on ids and times.
#[tokio::test]
#[ignore = "takes minutes"]
async fn any_of_many_calls_is_answered_or_refused_as_it_should_be() {
    let fuzz = Fuzz::start().await;
    tell(&format!("FUZZ_SEED={}", fuzz.seed));
    let figures = fuzz.run(500).await;
    tell(&format!("{} calls", figures.0.len()));
    let methods = methods();
    for code in (0..=16).map(Code::from).filter(|code| figures.count(*code, None) > 0) {
        let of = |method: &Method| figures.count(code, Some(&method.name));
        let each = methods.iter().map(|method| format!("{} {}", method.name, of(method)));
        let each = each.collect::<Vec<_>>().join(", ");
        tell(&format!("{code:?} {}: {each}", figures.count(code, None)));
    }
    for Method { name, .. } in &methods {
        let answered = figures.count(Code::Ok, Some(name));
        assert!(answered > 0, "{name} never succeeded: nothing was tried behind its checks");
    }
}
