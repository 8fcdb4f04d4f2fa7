//! What holds for every rpc: who may call, what errors carry, request ids, deadlines.

use std::time::{Duration, Instant};

use fast_zero::proto::{
    DESCRIPTORS,
    auth::v1::RevokeSessionRequest,
    todo::v1::{CreateTodoRequest, GetTodoRequest, ListTodosRequest, Todo, UpdateTodoRequest},
    user::v1::{DeleteUserRequest, GetUserRequest, UpdateUserRequest, User},
};
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD,
    app::connect,
    assert::{assert_invalid, assert_refused, assert_unauthenticated},
    postgres::TestDatabase,
    process::Run,
    todos::{Answer, titled, without_message},
    wire::Wire,
};

const GET_TODO: &str = "/fastzero.todo.v1.TodoService/GetTodo";
const LIST_TODOS: &str = "/fastzero.todo.v1.TodoService/ListTodos";
const CREATE_TODO: &str = "/fastzero.todo.v1.TodoService/CreateTodo";
const UPDATE_TODO: &str = "/fastzero.todo.v1.TodoService/UpdateTodo";

/// A good id of nothing.
const NO_ID: &str = "01890000-0000-7000-8000-000000000000";

/// The methods that the contract marks as public.
pub const PUBLIC: [&str; 3] = [
    "/fastzero.auth.v1.AuthService/Login",
    "/fastzero.auth.v1.AuthService/RefreshToken",
    "/fastzero.user.v1.UserService/CreateUser",
];

/// The paths of all methods of the contract.
fn methods() -> Vec<String> {
    let descriptors = FileDescriptorSet::decode(DESCRIPTORS).expect("good descriptors");
    let mut methods = Vec::new();
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                methods.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    methods
}

fn update_of(todo: Todo) -> Vec<u8> {
    UpdateTodoRequest { todo: Some(todo), update_mask: None }.encode_to_vec()
}

#[tokio::test]
async fn every_method_needs_an_access_token_unless_it_is_public() {
    let app = App::start().await;
    let anonymous = app.wire().await;
    let methods = methods();
    assert_eq!(methods.len(), 17, "the contract has 5 rpcs on users, 7 on sessions, 5 on to-dos");
    assert!(PUBLIC.iter().all(|public| methods.iter().any(|method| method == public)));
    for method in methods {
        // What an empty message lacks is told only to those who may know.
        let answer = anonymous.call(&method, &[]).await;
        if PUBLIC.contains(&&*method) {
            let status = answer.expect_err("an empty message is refused");
            assert_ne!(
                status.get_details_error_info().expect("a reason").reason,
                "NOT_AUTHENTICATED"
            );
            assert_ne!(status.message(), "Not authenticated", "{method}");
        } else {
            let status = assert_unauthenticated(answer, "NOT_AUTHENTICATED");
            assert_eq!(status.message(), "Not authenticated", "{method}");
        }
    }
}

#[tokio::test]
async fn health_and_reflection_are_public() {
    let app = App::start().await;
    let wire = app.wire().await;
    wire.call("/grpc.health.v1.Health/Check", &[]).await.expect("answered");
    // `list_services: ""`
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        wire.call(&path, &[0x3a, 0]).await.expect("answered");
    }
}

#[tokio::test]
async fn the_scheme_is_bearer_in_any_case() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let token = &ana.tokens().access_token;
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
        let wire = app.wire().await.with("authorization", format!("{scheme} {token}"));
        wire.call(LIST_TODOS, &[]).await.expect("listed");
    }
    for other in ["", "Bearer", "Bearer ", "Basic YTpi", token, &format!("Token {token}")] {
        let wire = app.wire().await.with("authorization", other);
        assert_unauthenticated(wire.call(LIST_TODOS, &[]).await, "NOT_AUTHENTICATED");
    }
}

#[tokio::test]
async fn an_unknown_method_is_unimplemented_with_and_without_a_token() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let anonymous = app.wire().await;
    let with_token = anonymous.clone().with_token_of(&ana);
    for path in [
        "/fastzero.todo.v1.TodoService/ShredTodo",
        "/fastzero.todo.v1.TodoService/getTodo",
        "/fastzero.todo.v1.TodoService/",
        "/fastzero.todo.v2.TodoService/GetTodo",
        "/fastzero.billing.v1.BillingService/Pay",
        "/fastzero.todo.v1.TodoService/GetTodo/",
        "/grpc.health.v1.Health/Chuck",
        "/grpc.reflection.v1.ServerReflection/Nothing",
        "/",
    ] {
        for caller in [&anonymous, &with_token] {
            assert_refused(caller.call(path, &[]).await, Code::Unimplemented, "UNIMPLEMENTED");
        }
    }
}

#[tokio::test]
async fn bytes_that_are_no_protobuf_are_internal_and_the_connection_lives() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana);
    // An unknown wire type, a field that is cut, text that is no UTF-8, a wrong wire type.
    for garbage in [&b"\xff\xff\xff"[..], b"\x0a\x7fa", b"\x0a\x01\xff", b"\x08\x01"] {
        let refused = wire.call(GET_TODO, garbage).await;
        assert_refused(refused, Code::Internal, "INTERNAL");
    }
    wire.call(LIST_TODOS, &[]).await.expect("the connection lives");
    let anonymous = app.wire().await;
    let refused = anonymous.call(PUBLIC[0], b"\xff\xff\xff").await;
    assert_refused(refused, Code::Internal, "INTERNAL");
}

#[tokio::test]
async fn fields_that_the_server_does_not_know_are_ignored() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana);
    // Field 1000 as a text, before and after those that are known.
    let unknown = &b"\xc2\x3e\x01a"[..];
    let create = CreateTodoRequest { todo: Some(titled("a")) }.encode_to_vec();
    wire.call(CREATE_TODO, &[unknown, &create, unknown].concat()).await.expect("added");
}

#[tokio::test]
async fn a_request_above_1_mib_is_out_of_range_and_the_connection_lives() {
    const MIB: usize = 1024 * 1024;
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana);
    let request = |size: usize| {
        let id = |length| GetTodoRequest { id: "a".repeat(length) };
        let overhead = id(size).encoded_len() - size;
        id(size - overhead).encode_to_vec()
    };
    assert_eq!(request(MIB).len(), MIB);
    assert_invalid(wire.call(GET_TODO, &request(MIB)).await, &["id"]);
    for size in [MIB + 1, 5 * MIB] {
        let refused = wire.call(GET_TODO, &request(size)).await;
        assert_refused(refused, Code::OutOfRange, "MESSAGE_TOO_LARGE");
        wire.call(LIST_TODOS, &[]).await.expect("the connection lives");
    }
}

#[tokio::test]
async fn a_compression_that_the_server_does_not_know_is_unimplemented() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana).with("grpc-encoding", "br");
    assert_refused(wire.call(LIST_TODOS, &[]).await, Code::Unimplemented, "UNIMPLEMENTED");
}

#[tokio::test]
async fn metadata_above_16_kib_is_refused_and_the_connection_lives() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana);
    wire.clone().with("x-small", "a".repeat(8 * 1024)).call(LIST_TODOS, &[]).await.expect("listed");
    let large = wire.clone().with("x-large", "a".repeat(17 * 1024));
    large.call(LIST_TODOS, &[]).await.expect_err("it is too large");
    wire.call(LIST_TODOS, &[]).await.expect("the connection lives");
}

/// The request id that came back, in the response or in the error.
fn returned<T>(answer: &Answer<T>) -> String {
    let metadata = match answer {
        Ok(response) => response.metadata(),
        Err(status) => status.metadata(),
    };
    let mut ids = metadata.get_all("x-request-id").iter();
    let id = ids.next().and_then(|id| id.to_str().ok()).expect("a request id").to_owned();
    assert!(ids.next().is_none(), "one request id");
    id
}

#[tokio::test]
async fn a_request_id_of_1_to_128_visible_characters_comes_back() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let anonymous = app.wire().await;
    let with_token = anonymous.clone().with_token_of(&ana);
    let visible: String = ('!'..='~').collect();
    let longest = "x".repeat(128);
    for id in ["a", "req-1/2:3", &visible, &longest] {
        let answers = async |caller: &Wire| {
            let caller = caller.clone().with("x-request-id", id);
            [
                caller.call(LIST_TODOS, &[]).await,
                caller.call(GET_TODO, &[]).await,
                caller.call(GET_TODO, b"\xff").await,
                caller.call("/no.such.Service/Method", &[]).await,
                caller.call("/grpc.health.v1.Health/Check", &[]).await,
                caller.call("/grpc.health.v1.Health/Check", b"\x0a\x01x").await,
            ]
        };
        for answer in answers(&with_token).await.into_iter().chain(answers(&anonymous).await) {
            assert_eq!(returned(&answer), id);
            if let Err(status) = answer {
                let info = status.get_details_request_info().expect("details");
                assert_eq!(info.request_id, id);
            }
        }
    }
}

#[tokio::test]
async fn any_other_request_id_is_replaced_by_one_of_the_servers() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana);
    let too_long = "x".repeat(129);
    let mut made = vec![returned(&wire.call(LIST_TODOS, &[]).await)];
    for bad in ["", " ", "a b", " a", "a ", &too_long] {
        let caller = wire.clone().with("x-request-id", bad);
        for answer in [caller.call(LIST_TODOS, &[]).await, caller.call(GET_TODO, &[]).await] {
            let id = returned(&answer);
            assert_ne!(id, bad);
            made.push(id);
        }
    }
    assert!(made.iter().all(|id| (1..=128).contains(&id.len())));
    made.sort();
    made.dedup();
    assert_eq!(made.len(), 13, "each call has an id of its own");
}

#[tokio::test]
async fn validation_comes_before_permission_existence_and_state() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let todo = ana.create_todo("a").await;
    let bad_user = |id: String| {
        let user = User { id, username: "!".into(), etag: "x".into(), ..User::default() };
        UpdateUserRequest { user: Some(user), update_mask: None }
    };
    for id in [bob.user_id(), NO_ID.to_owned(), "me".into()] {
        let refused = ana.users().update_user(bad_user(id)).await;
        assert_invalid(refused, &["user.username"]);
    }
    for id in [todo.id, NO_ID.to_owned()] {
        let bad_todo = Todo { id, etag: "x".into(), ..titled("\0") };
        assert_invalid(ana.try_update_todo(Some(bad_todo), None).await, &["todo.title"]);
    }
}

#[tokio::test]
async fn permission_comes_before_existence_and_existence_before_state() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for id in [bob.user_id(), NO_ID.to_owned()] {
        // The username is taken, and the etag is none of anybody's.
        let user =
            User { id: id.clone(), username: "ana".into(), etag: "x".into(), ..User::default() };
        let update = UpdateUserRequest { user: Some(user), update_mask: None };
        let refused = ana.users().update_user(update).await;
        assert_refused(refused, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
        let delete = DeleteUserRequest { id, etag: "x".into() };
        let refused = ana.users().delete_user(delete).await;
        assert_refused(refused, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
    }
    let get = GetUserRequest { id: NO_ID.into() };
    assert_refused(ana.users().get_user(get).await, Code::NotFound, "USER_NOT_FOUND");
    let revoke = RevokeSessionRequest { session_id: NO_ID.into() };
    let refused = ana.auth().revoke_session(revoke).await;
    assert_refused(refused, Code::NotFound, "SESSION_NOT_FOUND");
    assert_refused(ana.try_delete_todo(NO_ID, "x").await, Code::NotFound, "TODO_NOT_FOUND");
}

#[tokio::test]
async fn authentication_comes_before_everything_else() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let anonymous = app.wire().await;
    let get = GetTodoRequest { id: todo.id.clone() }.encode_to_vec();
    let large = vec![0; 2 * 1024 * 1024];
    for (path, message) in [
        (GET_TODO, &get[..]),
        (UPDATE_TODO, &update_of(Todo { etag: "x".into(), ..todo })),
        (GET_TODO, b"\xff\xff\xff"),
        (GET_TODO, &large),
    ] {
        let refused = anonymous.call(path, message).await;
        assert_unauthenticated(refused, "NOT_AUTHENTICATED");
    }
    let refused = anonymous.with("grpc-timeout", "soon").call(GET_TODO, &get).await;
    assert_unauthenticated(refused, "NOT_AUTHENTICATED");
}

#[tokio::test]
async fn a_deadline_that_is_no_deadline_is_refused() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let wire = app.wire().await.with_token_of(&ana);
    for bad in ["", "1", "S", "1s", "-1S", "+1S", "1.5S", "1 S", "123456789S", "soon"] {
        let refused = wire.clone().with("grpc-timeout", bad).call(LIST_TODOS, &[]).await;
        assert_invalid(refused, &["grpc-timeout"]);
    }
    for good in ["1H", "99999999H", "2M", "3S", "3000m", "3000000u", "99999999n"] {
        let answer = wire.clone().with("grpc-timeout", good).call(LIST_TODOS, &[]).await;
        answer.unwrap_or_else(|status| panic!("{good}: {status:?}"));
    }
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_whatever_it_waits_for() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("old").await;
    let held = app.lock_todo(&todo.id).await;
    let wire = app.wire().await.with_token_of(&ana);
    let update = update_of(Todo { title: "new".into(), ..todo.clone() });
    for deadline in ["300m", "1m", "1n", "0S"] {
        let begun = Instant::now();
        let answer = wire.clone().with("grpc-timeout", deadline).call(UPDATE_TODO, &update).await;
        assert_refused(answer, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
        assert!(begun.elapsed() < Duration::from_secs(2), "{deadline}: {:?}", begun.elapsed());
    }
    held.release().await;
    // The connections that the calls left behind serve others again.
    for _ in 0..8 {
        ana.create_todo("another").await;
    }
}

/// Nothing of a cause that the database gave.
fn assert_hides_its_cause(status: &Status) {
    let told = format!("{status:?}").to_lowercase();
    for cause in ["todos_", "relation", "column", "exist", "sql", "postgres", "42p01", "src/"] {
        assert!(!told.contains(cause), "{cause}: {told}");
    }
}

#[tokio::test]
async fn an_internal_error_hides_its_cause() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    app.execute("drop table todos").await;
    for answer in [
        ana.try_get_todo(&todo.id).await.map(without_message),
        ana.try_list_todos(ListTodosRequest::default()).await.map(without_message),
        ana.try_create_todo(Some(titled("b"))).await.map(without_message),
        ana.try_update_todo(Some(todo.clone()), None).await.map(without_message),
        ana.try_delete_todo(&todo.id, "").await.map(without_message),
    ] {
        let status = assert_refused(answer, Code::Internal, "INTERNAL");
        assert_hides_its_cause(&status);
    }
    let me = GetUserRequest { id: "me".into() };
    ana.users().get_user(me).await.expect("other tables are there");
}

#[tokio::test]
async fn the_log_tells_the_cause_of_an_internal_error_under_its_request_id() {
    let database = TestDatabase::create().await;
    let server = Run::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let anonymous = Client::new(connect(address).await);
    anonymous.sign_up("ana", "ana@example.com", PASSWORD).await;
    let ana = anonymous.logged_in("ana", PASSWORD).await.expect("logged in");
    let mut sql = database.connect().await;
    sqlx::raw_sql("drop table todos").execute(&mut sql).await.expect("dropped");

    let refused = ana.with("x-request-id", "find-me").try_get_todo(NO_ID).await;
    assert_refused(refused, Code::Internal, "INTERNAL");
    let line = server.line("internal error").await;
    for part in ["\"find-me\"", "\"ERROR\"", "todos", "does not exist"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

#[tokio::test]
async fn calls_recover_after_the_database_has_closed_all_connections() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let unguarded = Todo { etag: String::new(), ..todo.clone() };
    for write in [false, true] {
        app.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()",
        )
        .await;
        let mut answers = Vec::new();
        for _ in 0..12 {
            answers.push(if write {
                ana.try_update_todo(Some(unguarded.clone()), None).await.map(without_message)
            } else {
                ana.try_get_todo(&todo.id).await.map(without_message)
            });
        }
        assert!(answers.last().is_some_and(Result::is_ok), "{answers:?}");
        let failed: Vec<_> = answers.into_iter().filter_map(Result::err).collect();
        // One call notices for all.
        assert!(failed.len() <= 1, "{failed:?}");
        for status in failed {
            let status = assert_refused(
                Err::<Response<()>, _>(status),
                Code::Unavailable,
                "DATABASE_UNAVAILABLE",
            );
            assert!(status.get_details_retry_info().is_some());
            assert_hides_its_cause(&status);
        }
    }
}

#[tokio::test]
async fn a_call_that_is_given_up_leaves_the_others_alone() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (locked, free) = (ana.create_todo("locked").await, ana.create_todo("free").await);
    let mut held = app.lock_todo(&locked.id).await;
    tokio::select! {
        answer = ana.try_delete_todo(&locked.id, "") => panic!("not locked: {answer:?}"),
        () = held.until_awaited() => {}
    }
    // More calls than there are connections, while it still waits and afterwards.
    for _ in 0..8 {
        assert_eq!(ana.get_todo(&free.id).await, free);
    }
    held.release().await;
    for _ in 0..8 {
        assert_eq!(ana.get_todo(&free.id).await, free);
    }
}
