//! `fastzero.todo.v1.TodoService`.

use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    CONTENT_RETENTION_MICROS, DeletedTodo, Description, NewTodo, Title, Todo, TodoContent,
    TodoFilter, TodoPatch, TodoState,
    changes::service::{ChangeService, WatchMessages},
    order::{DeletedTodoCursor, OrderBy, TodoCursor},
    store::TodoStore,
};
use crate::{
    rpc::{
        caller::Caller,
        error::Error,
        etag::{self, Precondition},
        open_stream::OpenStream,
        page_token::{PageParams, PageRequest, PageTokenCodec, PageTokenScope},
        proto::{self, micros_to_timestamp, to_timestamp, todo::v1 as pb},
        update_mask::UpdateMask,
        validation::{FieldViolations, REQUIRED},
    },
    types::{clock::Clock, id::TodoId},
};

/// The implementation of `TodoService`.
#[derive(Debug)]
pub(crate) struct TodoService {
    /// The todos.
    pub(crate) store: TodoStore,
    /// Encodes the page tokens of lists.
    pub(crate) page_tokens: PageTokenCodec,
    /// Follows changes.
    pub(crate) changes: ChangeService,
}

#[tonic::async_trait]
impl pb::todo_service_server::TodoService for TodoService {
    type WatchTodosStream = WatchMessages;

    async fn create_todo(
        &self,
        request: Request<pb::CreateTodoRequest>,
    ) -> Result<Response<pb::CreateTodoResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let todo = parse_new_todo(request.into_inner(), self.store.clock())?;
        let todo = self.store.create(caller.user_id, todo).await;
        let todo = todo.map_err(|error| caller.own_user_error(error))?;
        Ok(Response::new(pb::CreateTodoResponse { todo: Some(todo.into()) }))
    }

    async fn get_todo(
        &self,
        request: Request<pb::GetTodoRequest>,
    ) -> Result<Response<pb::GetTodoResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let id = parse_id(&request.into_inner().id)?;
        let todo = self.store.get(caller.user_id, id).await?.ok_or(Error::TodoNotFound)?;
        Ok(Response::new(pb::GetTodoResponse { todo: Some(todo.into()) }))
    }

    async fn list_todos(
        &self,
        request: Request<pb::ListTodosRequest>,
    ) -> Result<Response<pb::ListTodosResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let request = request.into_inner();
        let query = scope_query(&request);
        let scope = PageTokenScope { list: "ListTodos", owner_id: caller.user_id, query: &query };
        let ListQuery { filter, order_by, page } = self.parse_list(&request, &scope)?;
        let page = self.store.list(caller.user_id, &filter, order_by, page).await?;
        let last = page.todos.last().filter(|_| page.has_more);
        let next_page_token = last.map_or_else(String::new, |todo| {
            self.page_tokens.encode(&order_by.cursor(todo), &scope)
        });
        let todos = page.todos.into_iter().map(pb::Todo::from).collect();
        Ok(Response::new(pb::ListTodosResponse { todos, next_page_token }))
    }

    async fn update_todo(
        &self,
        request: Request<pb::UpdateTodoRequest>,
    ) -> Result<Response<pb::UpdateTodoResponse>, Status> {
        let owner_id = Caller::from_request(&request)?.user_id;
        let TodoUpdate { id, precondition, patch } = parse_update(request.into_inner())?;
        let todo = self.store.update(owner_id, id, precondition, patch).await?;
        Ok(Response::new(pb::UpdateTodoResponse { todo: Some(todo.into()) }))
    }

    async fn delete_todo(
        &self,
        request: Request<pb::DeleteTodoRequest>,
    ) -> Result<Response<pb::DeleteTodoResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let request = request.into_inner();
        let id = parse_id(&request.id)?;
        let precondition = Precondition::parse(&request.etag);
        let (owner_id, purge) = (caller.user_id, request.purge);
        let deleted = self.store.delete(owner_id, id, precondition, purge).await?;
        Ok(Response::new(pb::DeleteTodoResponse { deleted: Some(deleted.into()) }))
    }

    async fn undelete_todo(
        &self,
        request: Request<pb::UndeleteTodoRequest>,
    ) -> Result<Response<pb::UndeleteTodoResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let id = parse_id(&request.into_inner().id)?;
        let todo = self.store.undelete(caller.user_id, id).await?;
        Ok(Response::new(pb::UndeleteTodoResponse { todo: Some(todo.into()) }))
    }

    async fn list_deleted_todos(
        &self,
        request: Request<pb::ListDeletedTodosRequest>,
    ) -> Result<Response<pb::ListDeletedTodosResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let request = request.into_inner();
        let scope =
            PageTokenScope { list: "ListDeletedTodos", owner_id: caller.user_id, query: b"" };
        let params = PageParams { size: request.page_size, skip: 0, token: &request.page_token };
        let mut violations = FieldViolations::default();
        let page = self.page_tokens.parse(&params, &scope, &mut violations);
        let page = violations.finish(|| page)?;
        let page = self.store.list_deleted(caller.user_id, page).await?;
        let last = page.deleted_todos.last().filter(|_| page.has_more);
        let next_page_token = last.map_or_else(String::new, |deleted| {
            self.page_tokens.encode(&DeletedTodoCursor { version: deleted.version }, &scope)
        });
        let deleted_todos = page.deleted_todos.into_iter().map(pb::DeletedTodo::from).collect();
        Ok(Response::new(pb::ListDeletedTodosResponse { deleted_todos, next_page_token }))
    }

    async fn sync_todos(
        &self,
        request: Request<pb::SyncTodosRequest>,
    ) -> Result<Response<pb::SyncTodosResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let response = self.changes.sync(caller.user_id, request.into_inner()).await?;
        Ok(Response::new(response))
    }

    async fn watch_todos(
        &self,
        request: Request<pb::WatchTodosRequest>,
    ) -> Result<Response<WatchMessages>, Status> {
        let caller = Caller::from_request(&request)?;
        let stream = OpenStream::from_request(&request)?;
        let watch = self.changes.watch(caller.user_id, request.get_ref(), stream.clone());
        Ok(Response::new(watch.inspect_err(|error| stream.set_reason(error))?))
    }
}

struct ListQuery {
    filter: TodoFilter,
    order_by: OrderBy,
    page: PageRequest<TodoCursor>,
}

impl TodoService {
    fn parse_list(
        &self,
        request: &pb::ListTodosRequest,
        scope: &PageTokenScope<'_>,
    ) -> Result<ListQuery, FieldViolations> {
        let mut violations = FieldViolations::default();
        let title = violations.check("title", TodoFilter::parse_title(&request.title));
        let description =
            violations.check("description", TodoFilter::parse_description(&request.description));
        let states = violations.check("states", TodoFilter::parse_states(&request.states));
        let order_by = violations.check("order_by", OrderBy::parse(&request.order_by));
        let params =
            PageParams { size: request.page_size, skip: request.skip, token: &request.page_token };
        let page = self.page_tokens.parse(&params, scope, &mut violations);
        violations.finish(|| {
            let filter = TodoFilter { title: title?, description: description?, states: states? };
            Some(ListQuery { filter, order_by: order_by?, page: page? })
        })
    }
}

/// Returns what a page token is bound to: the request without the fields that select the page.
fn scope_query(request: &pb::ListTodosRequest) -> Vec<u8> {
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

fn parse_new_todo(
    request: pb::CreateTodoRequest,
    clock: &Clock,
) -> Result<NewTodo, FieldViolations> {
    let mut violations = FieldViolations::default();
    let Some(todo) = request.todo else {
        return Err(FieldViolations::single("todo", REQUIRED));
    };
    let title = violations.check("todo.title", Title::parse(&todo.title));
    let description = violations.check("todo.description", Description::parse(&todo.description));
    let state = match todo.state {
        0 => Ok(TodoState::Draft),
        number => TodoState::parse(number),
    };
    let state = violations.check("todo.state", state);
    violations.finish(|| {
        let id = TodoId::generate(clock);
        Some(NewTodo { id, title: title?, description: description?, state: state? })
    })
}

struct TodoUpdate {
    id: TodoId,
    precondition: Precondition,
    patch: TodoPatch,
}

fn parse_update(request: pb::UpdateTodoRequest) -> Result<TodoUpdate, FieldViolations> {
    let mut violations = FieldViolations::default();
    let mask = request.update_mask.as_ref();
    let Some(todo) = request.todo else {
        let writable = [("title", true), ("description", true), ("state", true)];
        violations.add("todo", REQUIRED);
        violations.check("update_mask", UpdateMask::parse(mask, writable));
        return Err(violations);
    };
    let id = violations.check("todo.id", TodoId::parse(&todo.id));
    let writable = [
        ("title", !todo.title.is_empty()),
        ("description", !todo.description.is_empty()),
        ("state", todo.state != 0),
    ];
    let mask = violations.check("update_mask", UpdateMask::parse(mask, writable));
    let contains = |field| mask.as_ref().is_some_and(|mask| mask.contains(field));
    let title = contains("title")
        .then(|| violations.check("todo.title", Title::parse(&todo.title)))
        .flatten();
    let description = contains("description")
        .then(|| violations.check("todo.description", Description::parse(&todo.description)))
        .flatten();
    let state = contains("state")
        .then(|| violations.check("todo.state", TodoState::parse(todo.state)))
        .flatten();
    violations.finish(|| {
        let patch = TodoPatch { title, description, state };
        Some(TodoUpdate { id: id?, precondition: Precondition::parse(&todo.etag), patch })
    })
}

impl From<Todo> for proto::todo::v1::Todo {
    fn from(todo: Todo) -> Self {
        Self {
            id: todo.id.to_string(),
            title: todo.title,
            description: todo.description,
            state: todo.state.number().into(),
            create_time: Some(to_timestamp(todo.id.create_time())),
            update_time: Some(micros_to_timestamp(todo.version)),
            etag: etag::encode(todo.version),
        }
    }
}

impl From<DeletedTodo> for proto::todo::v1::DeletedTodo {
    fn from(DeletedTodo { id, content, version }: DeletedTodo) -> Self {
        let delete_time = Some(micros_to_timestamp(version));
        let Some(TodoContent { title, description, state }) = content else {
            let (id, etag) = (id.to_string(), etag::encode(version));
            let todo = pb::Todo { id, etag, ..pb::Todo::default() };
            return Self { todo: Some(todo), delete_time, purge_time: delete_time };
        };
        let todo = Todo { id, title, description, state, version };
        let purge_time = Some(micros_to_timestamp(version + CONTENT_RETENTION_MICROS));
        Self { todo: Some(todo.into()), delete_time, purge_time }
    }
}
