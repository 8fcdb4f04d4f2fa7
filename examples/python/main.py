"""A client of fast-zero: signs up, logs in, and creates, lists and updates todos."""

from concurrent.futures import ThreadPoolExecutor

import grpc

from fastzero.todo.v1 import todo_service_pb2, todo_service_pb2_grpc
from session import CALL_TIMEOUT, ErrorDetails, RefreshInterceptor, Session, run


def use_todos(todos):
    def create(title):
        request = todo_service_pb2.CreateTodoRequest(todo=todo_service_pb2.Todo(title=title))
        todos.CreateTodo(request, timeout=CALL_TIMEOUT)

    # Two concurrent calls: if the server rejects the access token, they refresh it once.
    with ThreadPoolExecutor() as pool:
        list(pool.map(create, ["Buy milk", "Water the plants"]))
    newest = todo_service_pb2.ListTodosRequest(order_by="create_time desc", page_size=2)
    page = todos.ListTodos(newest, timeout=CALL_TIMEOUT)
    for todo in page.todos:
        print(f"todo: {todo.title}")

    # The update changes the etag, so repeating it with the first etag fails.
    todo = page.todos[0]
    todo.state = todo_service_pb2.TODO_STATE_DOING
    update = todo_service_pb2.UpdateTodoRequest(todo=todo)
    todos.UpdateTodo(update, timeout=CALL_TIMEOUT)
    try:
        todos.UpdateTodo(update, timeout=CALL_TIMEOUT)
    except grpc.RpcError as error:
        print(f"stale etag: {ErrorDetails.from_error(error).reason}")
    try:
        create(" ")
    except grpc.RpcError as error:
        for path, description in ErrorDetails.from_error(error).violations.items():
            print(f"invalid field: {path}: {description}")


def main(channel):
    authenticated = grpc.intercept_channel(channel, RefreshInterceptor(Session.open(channel)))
    use_todos(todo_service_pb2_grpc.TodoServiceStub(authenticated))


if __name__ == "__main__":
    run(main)
