//! The floor: what a server costs that does nothing but check the token and run the
//! statement. No session, limits, deadlines, request ids, validation, log, metrics, error
//! details or graceful stop. A page token is the last id, in the clear.

use std::{collections::HashSet, env, num::TryFromIntError};

use deadpool_postgres::{Client, Manager, ManagerConfig, Pool, RecyclingMethod};
use fast_zero::{
    config::Config,
    proto::todo::v1::{
        CreateTodoRequest, CreateTodoResponse, DeleteTodoRequest, DeleteTodoResponse,
        GetTodoRequest, GetTodoResponse, ListTodosRequest, ListTodosResponse, Todo,
        UpdateTodoRequest, UpdateTodoResponse,
        todo_service_server::{TodoService, TodoServiceServer},
    },
};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use prost_types::Timestamp;
use serde::Deserialize;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio_postgres::{NoTls, Row, types::ToSql};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};
use uuid::Uuid;

use crate::{Result, postgres, sql};

struct Floor {
    pool: Pool,
    key: DecodingKey,
    validation: Validation,
}

/// Serves until the process is ended. Tells where, as fast-zero does.
pub async fn serve(config: &Config) -> Result<()> {
    let listener = TcpListener::bind(config.listen_addr).await?;
    let address = listener.local_addr()?;
    let mut database = postgres::config(&env::var("DATABASE_URL")?)?;
    database.options(sql::OPTIONS);
    let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let pool = Pool::builder(Manager::from_config(database, NoTls, manager))
        .max_size(config.database_max_connections.into())
        .build()?;
    let mut validation = Validation::new(Algorithm::HS256);
    validation.set_issuer(&[&config.token_issuer]);
    validation.set_audience(&[&config.token_audience]);
    validation.required_spec_claims = HashSet::from(["exp", "iss", "aud"].map(str::to_owned));
    let key = DecodingKey::from_secret(env::var("SECRET_KEY")?.as_bytes());
    let floor = Floor { pool, key, validation };
    let serving = Server::builder()
        .add_service(TodoServiceServer::new(floor))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    eprintln!(r#"{{"message":"serving","address":"{address}"}}"#);
    Ok(serving.await?)
}

/// Of a to-do that nobody has changed.
const FIRST_VERSION: i64 = 1;

#[derive(Deserialize)]
struct Claims {
    sub: String,
}

impl Floor {
    fn caller<T>(&self, request: &Request<T>) -> Result<Uuid, Status> {
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

    /// Runs a statement that gives one to-do, if any.
    async fn one(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Todo, Status> {
        let connection = self.connection().await?;
        let statement = connection.prepare_cached(sql).await.map_err(internal)?;
        let row = connection.query_opt(&statement, parameters).await.map_err(internal)?;
        todo_of(&row.ok_or_else(|| Status::not_found("Task not found."))?)
    }
}

#[tonic::async_trait]
impl TodoService for Floor {
    async fn create_todo(
        &self,
        request: Request<CreateTodoRequest>,
    ) -> Result<Response<CreateTodoResponse>, Status> {
        let owner = self.caller(&request)?;
        let todo = request.into_inner().todo.unwrap_or_default();
        let state = i16::try_from(todo.state).map_err(invalid)?;
        let (title, description) = (todo.title.to_lowercase(), todo.description.to_lowercase());
        let (id, now) = (Uuid::now_v7(), OffsetDateTime::now_utc());
        let parameters: &[&(dyn ToSql + Sync)] = &[
            &owner,
            &id,
            &todo.title,
            &title,
            &todo.description,
            &description,
            &state,
            &now,
            &FIRST_VERSION,
        ];
        let connection = self.connection().await?;
        let statement = connection.prepare_cached(sql::INSERT).await.map_err(internal)?;
        connection.execute(&statement, parameters).await.map_err(internal)?;
        let todo = Todo { title: todo.title, description: todo.description, ..Todo::default() };
        let todo = with_rest(todo, id, state, now, FIRST_VERSION);
        Ok(Response::new(CreateTodoResponse { todo: Some(todo) }))
    }

    async fn get_todo(
        &self,
        request: Request<GetTodoRequest>,
    ) -> Result<Response<GetTodoResponse>, Status> {
        let owner = self.caller(&request)?;
        let id = parse_id(&request.get_ref().id)?;
        let todo = self.one(sql::GET, &[&owner, &id]).await?;
        Ok(Response::new(GetTodoResponse { todo: Some(todo) }))
    }

    async fn list_todos(
        &self,
        request: Request<ListTodosRequest>,
    ) -> Result<Response<ListTodosResponse>, Status> {
        let owner = self.caller(&request)?;
        let request = request.into_inner();
        let title = (!request.title.is_empty()).then(|| request.title.to_lowercase());
        let (description, states) = (None::<String>, None::<Vec<i16>>);
        let limit = i64::from(request.page_size) + 1;
        let after = match &*request.page_token {
            "" => Uuid::nil(),
            token => parse_id(token)?,
        };
        let connection = self.connection().await?;
        let statement = connection.prepare_cached(sql::LIST).await.map_err(internal)?;
        let parameters: &[&(dyn ToSql + Sync)] = &[
            &owner,
            &title,
            &description,
            &states,
            &i64::from(request.skip),
            &limit,
            &sql::MAX_PAGE_BYTES,
            &sql::TODO_OVERHEAD_BYTES,
            &after,
        ];
        let rows = connection.query(&statement, parameters).await.map_err(internal)?;
        let size = usize::try_from(request.page_size).map_err(invalid)?;
        let todos: Vec<_> = rows.iter().take(size).map(todo_of).collect::<Result<_, _>>()?;
        let last = todos.last().filter(|_| rows.len() > size);
        let next_page_token = last.map(|todo| todo.id.clone()).unwrap_or_default();
        Ok(Response::new(ListTodosResponse { todos, next_page_token }))
    }

    async fn update_todo(
        &self,
        request: Request<UpdateTodoRequest>,
    ) -> Result<Response<UpdateTodoResponse>, Status> {
        let owner = self.caller(&request)?;
        let UpdateTodoRequest { todo, update_mask } = request.into_inner();
        let todo = todo.unwrap_or_default();
        let id = parse_id(&todo.id)?;
        let mask = update_mask.unwrap_or_default().paths;
        let covers = |field: &str| mask.iter().any(|path| path == field);
        let title = covers("title").then_some(todo.title);
        let description = covers("description").then_some(todo.description);
        let state = i16::try_from(todo.state).map_err(invalid)?;
        let state = covers("state").then_some(state);
        let (folded_title, folded_description) = (
            title.as_deref().map(str::to_lowercase),
            description.as_deref().map(str::to_lowercase),
        );
        let version = todo.etag.parse::<i64>().ok();
        let now = OffsetDateTime::now_utc();
        let todo = self
            .one(
                sql::UPDATE,
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
        Err(Status::unimplemented("nothing here deletes"))
    }
}

fn todo_of(row: &Row) -> Result<Todo, Status> {
    let id: Uuid = row.try_get(0).map_err(internal)?;
    let title = row.try_get(1).map_err(internal)?;
    let description = row.try_get(2).map_err(internal)?;
    let state: i16 = row.try_get(3).map_err(internal)?;
    let updated_at: OffsetDateTime = row.try_get(4).map_err(internal)?;
    let version: i64 = row.try_get(5).map_err(internal)?;
    let todo = Todo { title, description, ..Todo::default() };
    Ok(with_rest(todo, id, state, updated_at, version))
}

/// A to-do that has its texts, with all else.
fn with_rest(todo: Todo, id: Uuid, state: i16, updated_at: OffsetDateTime, version: i64) -> Todo {
    let (seconds, nanoseconds) = id.get_timestamp().map_or((0, 0), |time| time.to_unix());
    Todo {
        id: id.to_string(),
        state: state.into(),
        create_time: Some(Timestamp {
            seconds: i64::try_from(seconds).unwrap_or_default(),
            nanos: i32::try_from(nanoseconds).unwrap_or_default(),
        }),
        update_time: Some(Timestamp {
            seconds: updated_at.unix_timestamp(),
            nanos: i32::try_from(updated_at.nanosecond()).unwrap_or_default(),
        }),
        etag: version.to_string(),
        ..todo
    }
}

fn parse_id(text: &str) -> Result<Uuid, Status> {
    Uuid::try_parse(text).map_err(|_| Status::invalid_argument("id"))
}

fn invalid(_: TryFromIntError) -> Status {
    Status::invalid_argument("a number is too large")
}

fn internal(error: impl std::fmt::Display) -> Status {
    Status::internal(error.to_string())
}
