//! The RPCs of `TodoService`.

use fast_zero::proto::todo::v1::{
    CreateTodoRequest, CreateTodoResponse, DeleteTodoRequest, DeleteTodoResponse, DeletedTodo,
    GetTodoRequest, GetTodoResponse, ListDeletedTodosRequest, ListDeletedTodosResponse,
    ListTodosRequest, ListTodosResponse, Todo, UndeleteTodoRequest, UndeleteTodoResponse,
    UpdateTodoRequest, UpdateTodoResponse,
};
use prost_types::FieldMask;
use tonic::Response;

use super::{Client, RpcResult};

/// More pages than any list of a test has. A longer list does not end.
const MAX_PAGES: usize = 5_000;

/// Returns a todo with only a title.
pub fn todo_titled(title: &str) -> Todo {
    Todo { title: title.to_owned(), ..Todo::default() }
}

pub fn titles(todos: &[Todo]) -> Vec<&str> {
    todos.iter().map(|todo| &*todo.title).collect()
}

/// Drops the message, so that results of several methods have one type.
pub fn discard_message<T>(response: Response<T>) -> Response<()> {
    response.map(drop)
}

impl Client {
    pub async fn try_create_todo(&self, todo: Option<Todo>) -> RpcResult<CreateTodoResponse> {
        self.todos().create_todo(CreateTodoRequest { todo }).await
    }

    pub async fn try_get_todo(&self, id: &str) -> RpcResult<GetTodoResponse> {
        self.todos().get_todo(GetTodoRequest { id: id.to_owned() }).await
    }

    pub async fn get_todo(&self, id: &str) -> Todo {
        let response = self.try_get_todo(id).await.expect("found");
        response.into_inner().todo.expect("a todo")
    }

    pub async fn try_list_todos(&self, request: ListTodosRequest) -> RpcResult<ListTodosResponse> {
        self.todos().list_todos(request).await
    }

    /// Returns one page.
    pub async fn list_todos(&self, request: ListTodosRequest) -> ListTodosResponse {
        self.try_list_todos(request).await.expect("listed").into_inner()
    }

    /// Returns this page and all later ones.
    pub async fn list_todo_pages(&self, mut request: ListTodosRequest) -> Vec<ListTodosResponse> {
        let mut pages = Vec::new();
        loop {
            let page = self.list_todos(request.clone()).await;
            request.page_token.clone_from(&page.next_page_token);
            pages.push(page);
            if request.page_token.is_empty() {
                return pages;
            }
            assert!(pages.len() < MAX_PAGES, "the list does not end");
        }
    }

    /// Returns the todos of this page and all later ones.
    pub async fn list_all_todos(&self, request: ListTodosRequest) -> Vec<Todo> {
        let pages = self.list_todo_pages(request).await;
        pages.into_iter().flat_map(|page| page.todos).collect()
    }

    pub async fn try_update_todo(
        &self,
        todo: Option<Todo>,
        mask: Option<&[&str]>,
    ) -> RpcResult<UpdateTodoResponse> {
        let paths = |mask: &[&str]| mask.iter().map(|path| (*path).to_owned()).collect();
        let update_mask = mask.map(|mask| FieldMask { paths: paths(mask) });
        self.todos().update_todo(UpdateTodoRequest { todo, update_mask }).await
    }

    pub async fn update_todo(&self, todo: Todo, mask: Option<&[&str]>) -> Todo {
        let response = self.try_update_todo(Some(todo), mask).await.expect("updated");
        response.into_inner().todo.expect("a todo")
    }

    pub async fn try_delete_todo(&self, id: &str, etag: &str) -> RpcResult<DeleteTodoResponse> {
        let request = DeleteTodoRequest { id: id.to_owned(), etag: etag.to_owned(), purge: false };
        self.todos().delete_todo(request).await
    }

    pub async fn delete_todo(&self, id: &str) -> DeletedTodo {
        let response = self.try_delete_todo(id, "").await.expect("deleted");
        response.into_inner().deleted.expect("a deleted todo")
    }

    pub async fn try_purge_todo(&self, id: &str, etag: &str) -> RpcResult<DeleteTodoResponse> {
        let request = DeleteTodoRequest { id: id.to_owned(), etag: etag.to_owned(), purge: true };
        self.todos().delete_todo(request).await
    }

    pub async fn purge_todo(&self, id: &str) -> DeletedTodo {
        let response = self.try_purge_todo(id, "").await.expect("purged");
        response.into_inner().deleted.expect("a deleted todo")
    }

    pub async fn try_undelete_todo(&self, id: &str) -> RpcResult<UndeleteTodoResponse> {
        self.todos().undelete_todo(UndeleteTodoRequest { id: id.to_owned() }).await
    }

    pub async fn undelete_todo(&self, id: &str) -> Todo {
        let response = self.try_undelete_todo(id).await.expect("restored");
        response.into_inner().todo.expect("a todo")
    }

    pub async fn try_list_deleted_todos(
        &self,
        request: ListDeletedTodosRequest,
    ) -> RpcResult<ListDeletedTodosResponse> {
        self.todos().list_deleted_todos(request).await
    }

    /// Returns the deleted todos of all pages of this size.
    pub async fn list_deleted_todos(&self, page_size: i32) -> Vec<DeletedTodo> {
        let mut request = ListDeletedTodosRequest { page_size, ..<_>::default() };
        let mut deleted = Vec::new();
        for _ in 0..MAX_PAGES {
            let page = self.try_list_deleted_todos(request.clone()).await.expect("listed");
            let page = page.into_inner();
            deleted.extend(page.deleted_todos);
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return deleted;
            }
        }
        panic!("the list does not end");
    }
}
