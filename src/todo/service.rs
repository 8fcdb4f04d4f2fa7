//! The rpcs on to-dos.

use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    Description, Filter, NewTodo, OrderBy, Place, State, Title, Todo, TodoChange,
    store::{self, PlainPage},
};
use crate::{
    caller::Caller,
    coalesce::Coalescer,
    database::Database,
    error::Error,
    etag::{self, Guard},
    mask::Mask,
    pagination::{Page, PageFields, PageTokens, Scope},
    proto::{self, timestamp, todo::v1 as pb},
    types::{clock, id::TodoId},
    validation::{FieldViolations, REQUIRED},
};

/// Implements `fastzero.todo.v1.TodoService`.
#[derive(Debug)]
pub struct TodoService {
    /// Where to-dos are kept.
    pub database: Database,
    /// Looks up to-dos.
    pub find: Coalescer<store::Find>,
    /// Lists to-dos as most callers do.
    pub list: Coalescer<store::ListPlain>,
    /// Adds to-dos.
    pub insert: Coalescer<store::Insert>,
    /// For lists.
    pub page_tokens: PageTokens,
}

#[tonic::async_trait]
impl pb::todo_service_server::TodoService for TodoService {
    async fn create_todo(
        &self,
        request: Request<pb::CreateTodoRequest>,
    ) -> Result<Response<pb::CreateTodoResponse>, Status> {
        let caller = Caller::of(&request)?;
        let todo = parse_new_todo(request.into_inner())?;
        let todo = self.insert.ask((caller.user_id, todo)).await?;
        Ok(Response::new(pb::CreateTodoResponse { todo: Some(todo.into()) }))
    }

    async fn get_todo(
        &self,
        request: Request<pb::GetTodoRequest>,
    ) -> Result<Response<pb::GetTodoResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = parse_id(&request.into_inner().id)?;
        let todo = self.find.ask((caller.user_id, id)).await?.ok_or(Error::TodoNotFound)?;
        Ok(Response::new(pb::GetTodoResponse { todo: Some(todo.into()) }))
    }

    async fn list_todos(
        &self,
        request: Request<pb::ListTodosRequest>,
    ) -> Result<Response<pb::ListTodosResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let query = query_of(&request);
        let scope = Scope { list: "ListTodos", owner_id: caller.user_id, query: &query };
        let List { filter, order_by, page } = self.parse_list(&request, &scope)?;
        let listed = match PlainPage::of(caller.user_id, &filter, order_by, page) {
            Ok(page) => self.list.ask(page).await?,
            Err(page) => {
                self.database
                    .run(async |connection| {
                        store::list(connection, caller.user_id, &filter, order_by, &page).await
                    })
                    .await?
            }
        };
        let last = listed.todos.last().filter(|_| listed.more);
        let next_page_token = last
            .map_or_else(String::new, |todo| self.page_tokens.seal(&order_by.cursor(todo), &scope));
        let todos = listed.todos.into_iter().map(pb::Todo::from).collect();
        Ok(Response::new(pb::ListTodosResponse { todos, next_page_token }))
    }

    async fn update_todo(
        &self,
        request: Request<pb::UpdateTodoRequest>,
    ) -> Result<Response<pb::UpdateTodoResponse>, Status> {
        let caller = Caller::of(&request)?;
        let Update { id, guard, change } = parse_update(request.into_inner())?;
        let now = clock::now();
        let todo = self
            .database
            .run(async |connection| {
                let owner_id = caller.user_id;
                let todo =
                    store::update(&mut *connection, owner_id, id, guard, &change, now).await?;
                match todo {
                    Some(todo) => Ok(todo),
                    None if guard == Guard::None => Err(Error::TodoNotFound),
                    None => Err(refusal(store::find(connection, owner_id, id).await?.is_some())),
                }
            })
            .await?;
        Ok(Response::new(pb::UpdateTodoResponse { todo: Some(todo.into()) }))
    }

    async fn delete_todo(
        &self,
        request: Request<pb::DeleteTodoRequest>,
    ) -> Result<Response<pb::DeleteTodoResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = parse_id(&request.id)?;
        let guard = Guard::parse(&request.etag);
        self.database
            .run(async |connection| {
                let owner_id = caller.user_id;
                if store::delete(&mut *connection, owner_id, id, guard).await? {
                    return Ok(());
                }
                if guard == Guard::None {
                    return Err(Error::TodoNotFound);
                }
                Err(refusal(store::find(connection, owner_id, id).await?.is_some()))
            })
            .await?;
        Ok(Response::new(pb::DeleteTodoResponse {}))
    }
}

struct List {
    filter: Filter,
    order_by: OrderBy,
    page: Page<Place>,
}

impl TodoService {
    fn parse_list(
        &self,
        request: &pb::ListTodosRequest,
        scope: &Scope<'_>,
    ) -> Result<List, FieldViolations> {
        let mut violations = FieldViolations::default();
        let title = violations.check("title", Filter::parse_title(&request.title));
        let description =
            violations.check("description", Filter::parse_description(&request.description));
        let states = violations.check("states", Filter::parse_states(&request.states));
        let order_by = violations.check("order_by", OrderBy::parse(&request.order_by));
        let fields =
            PageFields { size: request.page_size, skip: request.skip, token: &request.page_token };
        let page = self.page_tokens.parse(&fields, scope, &mut violations);
        violations.finish(|| {
            let filter = Filter { title: title?, description: description?, states: states? };
            Some(List { filter, order_by: order_by?, page: page? })
        })
    }
}

/// What a page token is bound to: the request without the fields that say which page.
fn query_of(request: &pb::ListTodosRequest) -> Vec<u8> {
    let query = pb::ListTodosRequest {
        title: request.title.clone(),
        description: request.description.clone(),
        states: request.states.clone(),
        order_by: request.order_by.clone(),
        ..Default::default()
    };
    query.encode_to_vec()
}

fn parse_id(id: &str) -> Result<TodoId, FieldViolations> {
    TodoId::parse(id).map_err(|invalid| FieldViolations::single("id", invalid))
}

fn parse_new_todo(request: pb::CreateTodoRequest) -> Result<NewTodo, FieldViolations> {
    let mut violations = FieldViolations::default();
    let Some(todo) = request.todo else {
        return Err(FieldViolations::single("todo", REQUIRED));
    };
    let title = violations.check("todo.title", Title::parse(&todo.title));
    let description = violations.check("todo.description", Description::parse(&todo.description));
    let state = match todo.state {
        0 => Ok(State::Draft),
        number => State::parse(number),
    };
    let state = violations.check("todo.state", state);
    violations.finish(|| {
        let id = TodoId::generate();
        Some(NewTodo { id, title: title?, description: description?, state: state? })
    })
}

struct Update {
    id: TodoId,
    guard: Guard,
    change: TodoChange,
}

fn parse_update(request: pb::UpdateTodoRequest) -> Result<Update, FieldViolations> {
    let mut violations = FieldViolations::default();
    let mask = request.update_mask.as_ref();
    let Some(todo) = request.todo else {
        let writable = [("title", true), ("description", true), ("state", true)];
        violations.add("todo", REQUIRED);
        violations.check("update_mask", Mask::parse(mask, writable));
        return Err(violations);
    };
    let id = violations.check("todo.id", TodoId::parse(&todo.id));
    let writable = [
        ("title", !todo.title.is_empty()),
        ("description", !todo.description.is_empty()),
        ("state", todo.state != 0),
    ];
    let mask = violations.check("update_mask", Mask::parse(mask, writable));
    let covers = |field| mask.as_ref().is_some_and(|mask| mask.covers(field));
    let title = covers("title")
        .then(|| violations.check("todo.title", Title::parse(&todo.title)))
        .flatten();
    let description = covers("description")
        .then(|| violations.check("todo.description", Description::parse(&todo.description)))
        .flatten();
    let state =
        covers("state").then(|| violations.check("todo.state", State::parse(todo.state))).flatten();
    violations.finish(|| {
        let change = TodoChange { title, description, state };
        Some(Update { id: id?, guard: Guard::parse(&todo.etag), change })
    })
}

/// Why a guarded change found nothing to change.
fn refusal(exists: bool) -> Error {
    if exists { Error::EtagMismatch } else { Error::TodoNotFound }
}

impl From<Todo> for proto::todo::v1::Todo {
    fn from(todo: Todo) -> Self {
        Self {
            id: todo.id.to_string(),
            title: todo.title,
            description: todo.description,
            state: todo.state.number().into(),
            create_time: Some(timestamp(todo.id.create_time())),
            update_time: Some(timestamp(todo.updated_at)),
            etag: etag::format(todo.version),
        }
    }
}
