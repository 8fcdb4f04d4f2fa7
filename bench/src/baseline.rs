//! The baseline: a gRPC server that verifies the access token and runs one prepared
//! statement per call.
//!
//! It has no sessions, limits, deadlines, request IDs, validation, logs, metrics, error
//! details or graceful shutdown. Its page tokens are the last ID in plain text.

use std::{collections::HashSet, env, fmt::Display, num::TryFromIntError, pin::Pin};

use deadpool_postgres::{Client, Manager, ManagerConfig, Pool, RecyclingMethod};
use fast_zero::proto::todo::v1::{
    CreateTodoRequest, CreateTodoResponse, DeleteTodoRequest, DeleteTodoResponse, GetTodoRequest,
    GetTodoResponse, ListDeletedTodosRequest, ListDeletedTodosResponse, ListTodosRequest,
    ListTodosResponse, SyncTodosRequest, SyncTodosResponse, Todo, UndeleteTodoRequest,
    UndeleteTodoResponse, UpdateTodoRequest, UpdateTodoResponse, WatchTodosRequest,
    WatchTodosResponse,
    todo_service_server::{TodoService, TodoServiceServer},
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use prost_types::Timestamp;
use serde::Deserialize;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio_postgres::{NoTls, Row, types::ToSql};
use tonic::{
    Request, Response, Status,
    codegen::tokio_stream::Stream,
    transport::{Server, server::TcpIncoming},
};
use uuid::Uuid;

use crate::{arguments::Config, error::Result, postgres, sql};

struct Baseline {
    pool: Pool,
    key: DecodingKey,
    validation: Validation,
}

/// Serves until the process is terminated. Logs the address in the format of the service,
/// which [`crate::server`] parses.
pub async fn serve(config: &Config) -> Result<()> {
    let listener = TcpListener::bind(config.listen.grpc.listen_addr).await?;
    let address = listener.local_addr()?;
    let pool = connection_pool(config)?;
    let mut validation = Validation::new(Algorithm::HS256);
    validation.set_issuer(&[&config.tokens.token_issuer]);
    validation.set_audience(&[&config.tokens.token_audience]);
    validation.required_spec_claims = HashSet::from(["exp", "iss", "aud"].map(str::to_owned));
    let key = DecodingKey::from_secret(env::var("SECRET_KEY")?.as_bytes());
    let baseline = Baseline { pool, key, validation };
    let serving = Server::builder()
        .add_service(TodoServiceServer::new(baseline))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    eprintln!(r#"{{"message":"serving","address":"{address}"}}"#);
    Ok(serving.await?)
}

fn connection_pool(config: &Config) -> Result<Pool> {
    let mut database = postgres::parse_url(&env::var("DATABASE_URL")?)?;
    database.options(sql::OPTIONS);
    let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = Manager::from_config(database, NoTls, manager);
    Ok(Pool::builder(manager).max_size(config.limits.database_max_connections.into()).build()?)
}

/// The claims that the baseline reads from an access token.
#[derive(Deserialize)]
struct Claims {
    sub: String,
}

impl Baseline {
    /// Verifies the access token and returns the caller's user ID.
    fn authenticate<T>(&self, request: &Request<T>) -> Result<Uuid, Status> {
        let denied = || Status::unauthenticated("Could not validate credentials");
        let header = request.metadata().get("authorization").ok_or_else(denied)?;
        let bearer = header.to_str().map_err(|_| denied())?;
        let token = bearer.strip_prefix("Bearer ").ok_or_else(denied)?;
        let data = jsonwebtoken::decode::<Claims>(token, &self.key, &self.validation);
        parse_id(&data.map_err(|_| denied())?.claims.sub)
    }

    async fn connection(&self) -> Result<Client, Status> {
        self.pool.get().await.map_err(internal)
    }

    /// Runs a statement that returns at most one todo.
    async fn query_todo(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Todo, Status> {
        let connection = self.connection().await?;
        let statement = connection.prepare_cached(sql).await.map_err(internal)?;
        let row = connection.query_opt(&statement, parameters).await.map_err(internal)?;
        todo_from_row(&row.ok_or_else(|| Status::not_found("Task not found."))?)
    }
}

#[tonic::async_trait]
impl TodoService for Baseline {
    async fn create_todo(
        &self,
        request: Request<CreateTodoRequest>,
    ) -> Result<Response<CreateTodoResponse>, Status> {
        let owner = self.authenticate(&request)?;
        let todo = request.into_inner().todo.unwrap_or_default();
        let state = i16::try_from(todo.state).map_err(out_of_range)?;
        let (title, description) = (todo.title.to_lowercase(), todo.description.to_lowercase());
        let (id, now) = (Uuid::now_v7(), now_micros()?);
        let parameters: &[&(dyn ToSql + Sync)] =
            &[&owner, &id, &todo.title, &title, &todo.description, &description, &state, &now];
        let connection = self.connection().await?;
        let statement = connection.prepare_cached(&sql::INSERT).await.map_err(internal)?;
        let row = connection.query_one(&statement, parameters).await.map_err(internal)?;
        let todo = Todo { title: todo.title, description: todo.description, ..Todo::default() };
        let todo = complete(todo, id, state, row.try_get(0).map_err(internal)?);
        Ok(Response::new(CreateTodoResponse { todo: Some(todo) }))
    }

    async fn get_todo(
        &self,
        request: Request<GetTodoRequest>,
    ) -> Result<Response<GetTodoResponse>, Status> {
        let owner = self.authenticate(&request)?;
        let id = parse_id(&request.get_ref().id)?;
        let todo = self.query_todo(&sql::GET, &[&owner, &id]).await?;
        Ok(Response::new(GetTodoResponse { todo: Some(todo) }))
    }

    async fn list_todos(
        &self,
        request: Request<ListTodosRequest>,
    ) -> Result<Response<ListTodosResponse>, Status> {
        let owner = self.authenticate(&request)?;
        let request = request.into_inner();
        let title = (!request.title.is_empty()).then(|| request.title.to_lowercase());
        let (description, states) = (None::<String>, None::<Vec<i16>>);
        let limit = i64::from(request.page_size) + 1;
        let after = match &*request.page_token {
            "" => Uuid::nil(),
            token => parse_id(token)?,
        };
        let connection = self.connection().await?;
        let skip = i64::from(request.skip);
        let (text, parameters): (_, &[&(dyn ToSql + Sync)]) = match &title {
            None => (*sql::LIST, &[&owner, &skip, &limit, &after]),
            title => (
                *sql::LIST_FILTERED,
                &[&owner, &skip, &limit, title, &description, &states, &after],
            ),
        };
        let statement = connection.prepare_cached(text).await.map_err(internal)?;
        let rows = connection.query(&statement, parameters).await.map_err(internal)?;
        let size = usize::try_from(request.page_size).map_err(out_of_range)?;
        let todos: Vec<_> = rows.iter().take(size).map(todo_from_row).collect::<Result<_, _>>()?;
        let last = todos.last().filter(|_| rows.len() > size);
        let next_page_token = last.map(|todo| todo.id.clone()).unwrap_or_default();
        Ok(Response::new(ListTodosResponse { todos, next_page_token }))
    }

    async fn update_todo(
        &self,
        request: Request<UpdateTodoRequest>,
    ) -> Result<Response<UpdateTodoResponse>, Status> {
        let owner = self.authenticate(&request)?;
        let UpdateTodoRequest { todo, update_mask } = request.into_inner();
        let todo = todo.unwrap_or_default();
        let id = parse_id(&todo.id)?;
        let mask = update_mask.unwrap_or_default().paths;
        let contains = |field: &str| mask.iter().any(|path| path == field);
        let title = contains("title").then_some(todo.title);
        let description = contains("description").then_some(todo.description);
        let state = i16::try_from(todo.state).map_err(out_of_range)?;
        let state = contains("state").then_some(state);
        let (folded_title, folded_description) = (
            title.as_deref().map(str::to_lowercase),
            description.as_deref().map(str::to_lowercase),
        );
        let version = todo.etag.parse::<i64>().ok();
        let now = now_micros()?;
        let todo = self
            .query_todo(
                &sql::UPDATE,
                &[
                    &owner,
                    &id,
                    &version,
                    &title,
                    &folded_title,
                    &description,
                    &folded_description,
                    &state,
                    &now,
                ],
            )
            .await?;
        Ok(Response::new(UpdateTodoResponse { todo: Some(todo) }))
    }

    async fn delete_todo(
        &self,
        _: Request<DeleteTodoRequest>,
    ) -> Result<Response<DeleteTodoResponse>, Status> {
        Err(Status::unimplemented("the baseline does not implement DeleteTodo"))
    }

    async fn undelete_todo(
        &self,
        _: Request<UndeleteTodoRequest>,
    ) -> Result<Response<UndeleteTodoResponse>, Status> {
        Err(Status::unimplemented("the baseline does not implement UndeleteTodo"))
    }

    async fn list_deleted_todos(
        &self,
        _: Request<ListDeletedTodosRequest>,
    ) -> Result<Response<ListDeletedTodosResponse>, Status> {
        Err(Status::unimplemented("the baseline does not implement ListDeletedTodos"))
    }

    async fn sync_todos(
        &self,
        _: Request<SyncTodosRequest>,
    ) -> Result<Response<SyncTodosResponse>, Status> {
        Err(Status::unimplemented("the baseline does not implement SyncTodos"))
    }

    type WatchTodosStream = Pin<Box<dyn Stream<Item = Result<WatchTodosResponse, Status>> + Send>>;

    async fn watch_todos(
        &self,
        _: Request<WatchTodosRequest>,
    ) -> Result<Response<Self::WatchTodosStream>, Status> {
        Err(Status::unimplemented("the baseline does not implement WatchTodos"))
    }
}

fn todo_from_row(row: &Row) -> Result<Todo, Status> {
    let id: Uuid = row.try_get(0).map_err(internal)?;
    let title = row.try_get(1).map_err(internal)?;
    let description = row.try_get(2).map_err(internal)?;
    let state: i16 = row.try_get(3).map_err(internal)?;
    let version: i64 = row.try_get(4).map_err(internal)?;
    let todo = Todo { title, description, ..Todo::default() };
    Ok(complete(todo, id, state, version))
}

/// Returns the current time in microseconds since 1970.
fn now_micros() -> Result<i64, Status> {
    let nanos = OffsetDateTime::now_utc().unix_timestamp_nanos();
    i64::try_from(nanos / 1_000).map_err(out_of_range)
}

/// Completes a todo that has only its texts. The version is the time of the last update in
/// microseconds.
fn complete(todo: Todo, id: Uuid, state: i16, version: i64) -> Todo {
    let (seconds, nanoseconds) = id.get_timestamp().map_or((0, 0), |time| time.to_unix());
    Todo {
        id: id.to_string(),
        state: state.into(),
        create_time: Some(Timestamp {
            seconds: i64::try_from(seconds).unwrap_or_default(),
            nanos: i32::try_from(nanoseconds).unwrap_or_default(),
        }),
        update_time: Some(Timestamp {
            seconds: version / 1_000_000,
            nanos: i32::try_from(version % 1_000_000 * 1_000).unwrap_or_default(),
        }),
        etag: version.to_string(),
        ..todo
    }
}

fn parse_id(text: &str) -> Result<Uuid, Status> {
    Uuid::try_parse(text).map_err(|_| Status::invalid_argument("invalid ID"))
}

fn out_of_range(_: TryFromIntError) -> Status {
    Status::invalid_argument("number out of range")
}

fn internal(error: impl Display) -> Status {
    Status::internal(error.to_string())
}
