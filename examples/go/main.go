// A client of fast-zero: signs up, logs in, and creates, lists and updates todos.
//
// Two parts are meant to be copied: session.intercept keeps calls authenticated, and
// errorDetailsOf reads the reason of an error.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	authv1 "example.com/fastzero-client/gen/fastzero/auth/v1"
	todov1 "example.com/fastzero-client/gen/fastzero/todo/v1"
	userv1 "example.com/fastzero-client/gen/fastzero/user/v1"
)

const (
	username = "ana"
	password = "correct horse"
	// callTimeout is the time until a call's deadline. The server allows 5 seconds at most.
	callTimeout = 3 * time.Second
)

// publicMethods need no access token.
var publicMethods = map[string]bool{
	authv1.AuthService_ListSigningKeys_FullMethodName: true,
	authv1.AuthService_Login_FullMethodName:           true,
	authv1.AuthService_RefreshToken_FullMethodName:    true,
	authv1.AuthService_ResetPassword_FullMethodName:   true,
	userv1.UserService_CreateUser_FullMethodName:      true,
}

// errorDetails are the google.rpc details of an error. Programs decide by the reason.
type errorDetails struct {
	reason     string
	violations []*errdetails.BadRequest_FieldViolation
	retry      *errdetails.RetryInfo
}

func errorDetailsOf(err error) (details errorDetails) {
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == "fastzero" {
				details.reason = detail.Reason
			}
		case *errdetails.BadRequest:
			details.violations = detail.FieldViolations
		case *errdetails.RetryInfo:
			details.retry = detail
		}
	}
	return details
}

// isRefreshable reports whether the client refreshes its access token after an error with this
// reason. A token with a retired key is TOKEN_INVALID, while its session may still be active.
func isRefreshable(reason string) bool {
	return reason == "TOKEN_EXPIRED" || reason == "TOKEN_INVALID"
}

// session holds the tokens of a login.
type session struct {
	mu     sync.Mutex
	tokens *authv1.TokenSet
}

// intercept gives each call a deadline and the access token, which it refreshes when the server
// rejects it. The server reports the expiry (TOKEN_EXPIRED), so the client's clock does not matter.
func (s *session) intercept(ctx context.Context, method string, request, reply any,
	conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if publicMethods[method] {
		return invoke(ctx, method, request, reply, conn, options...)
	}
	attempt := func(rejected string) (accessToken string, err error) {
		if accessToken, err = s.accessToken(ctx, conn, rejected); err != nil {
			return "", err
		}
		ctx := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+accessToken)
		return accessToken, invoke(ctx, method, request, reply, conn, options...)
	}
	accessToken, err := attempt("")
	if isRefreshable(errorDetailsOf(err).reason) {
		_, err = attempt(accessToken)
	}
	return err
}

// accessToken returns the access token, after a refresh if it still is the rejected one. The first
// of several concurrent calls refreshes; the others wait and use its token.
func (s *session) accessToken(ctx context.Context, conn *grpc.ClientConn, rejected string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tokens == nil {
		return "", status.Error(codes.Unauthenticated, "not logged in")
	}
	if s.tokens.AccessToken == rejected {
		request := &authv1.RefreshTokenRequest{RefreshToken: s.tokens.RefreshToken}
		response, err := authv1.NewAuthServiceClient(conn).RefreshToken(ctx, request)
		if err != nil {
			return "", err
		}
		fmt.Println("refreshed the access token")
		s.tokens = response.GetTokens()
	}
	return s.tokens.GetAccessToken(), nil
}

// logIn signs up unless the username exists, then logs in.
func logIn(ctx context.Context, conn *grpc.ClientConn) (*authv1.TokenSet, error) {
	user := &userv1.CreateUserRequest{Username: username, Email: username + "@example.com", Password: password}
	_, err := userv1.NewUserServiceClient(conn).CreateUser(ctx, user)
	if err == nil {
		fmt.Println("signed up:", username)
	} else if errorDetailsOf(err).reason == "USERNAME_EXISTS" {
		fmt.Println("already signed up: USERNAME_EXISTS")
	} else {
		return nil, err
	}
	login := &authv1.LoginRequest{Login: username, Password: password}
	response, err := authv1.NewAuthServiceClient(conn).Login(ctx, login)
	return response.GetTokens(), err
}

func useTodos(ctx context.Context, todos todov1.TodoServiceClient) error {
	// Two concurrent calls: if the server rejects the access token, they refresh it once.
	group, groupCtx := errgroup.WithContext(ctx)
	for _, title := range []string{"Buy milk", "Water the plants"} {
		group.Go(func() error {
			_, err := todos.CreateTodo(groupCtx, &todov1.CreateTodoRequest{Todo: &todov1.Todo{Title: title}})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	list, err := todos.ListTodos(ctx, &todov1.ListTodosRequest{OrderBy: "create_time desc", PageSize: 2})
	if err != nil {
		return err
	}
	for _, todo := range list.Todos {
		fmt.Println("todo:", todo.Title)
	}

	// The update changes the etag, so repeating it with the first etag fails.
	todo := list.Todos[0]
	todo.State = todov1.TodoState_TODO_STATE_DOING
	if _, err := todos.UpdateTodo(ctx, &todov1.UpdateTodoRequest{Todo: todo}); err != nil {
		return err
	}
	_, err = todos.UpdateTodo(ctx, &todov1.UpdateTodoRequest{Todo: todo})
	fmt.Println("stale etag:", errorDetailsOf(err).reason)

	_, err = todos.CreateTodo(ctx, &todov1.CreateTodoRequest{Todo: &todov1.Todo{Title: " "}})
	for _, violation := range errorDetailsOf(err).violations {
		fmt.Printf("invalid field: %s: %s\n", violation.Field, violation.Description)
	}
	return nil
}

func run(ctx context.Context) error {
	var session session
	conn, err := grpc.NewClient(cmp.Or(os.Getenv("FASTZERO_ADDR"), "localhost:50051"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(session.intercept))
	if err != nil {
		return err
	}
	defer conn.Close()
	if accessToken := os.Getenv("FASTZERO_ACCESS_TOKEN"); accessToken != "" {
		refreshToken := os.Getenv("FASTZERO_REFRESH_TOKEN")
		session.tokens = &authv1.TokenSet{AccessToken: accessToken, RefreshToken: refreshToken}
	} else if session.tokens, err = logIn(ctx, conn); err != nil {
		return err
	}
	return useTodos(ctx, todov1.NewTodoServiceClient(conn))
}

func main() {
	if err := run(context.Background()); err != nil {
		details := errorDetailsOf(err)
		fmt.Fprintf(os.Stderr, "%v (%s)\n", err, details.reason)
		if details.retry != nil {
			fmt.Fprintf(os.Stderr, "retry after %.0f s\n", details.retry.RetryDelay.AsDuration().Seconds())
		}
		os.Exit(1)
	}
}
