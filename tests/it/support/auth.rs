//! The RPCs of `AuthService`.

use fast_zero::proto::auth::v1::{
    ChangePasswordRequest, ChangePasswordResponse, IntrospectTokenRequest, IntrospectTokenResponse,
    ListSessionsRequest, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, LogoutScope,
    RefreshTokenRequest, RefreshTokenResponse, ResetPasswordRequest, ResetPasswordResponse,
    RevokeSessionRequest, RevokeSessionResponse, Session, TokenSet,
};

use super::{Client, RpcResult, assert::assert_unauthenticated};

impl Client {
    pub async fn try_log_in(&self, login: &str, password: &str) -> RpcResult<LoginResponse> {
        let request = LoginRequest { login: login.to_owned(), password: password.to_owned() };
        self.auth().login(request).await
    }

    pub async fn try_refresh(&self, token: &str) -> RpcResult<RefreshTokenResponse> {
        let request = RefreshTokenRequest { refresh_token: token.to_owned() };
        self.auth().refresh_token(request).await
    }

    pub async fn refresh(&self, token: &str) -> TokenSet {
        let response = self.try_refresh(token).await.expect("refreshed");
        response.into_inner().tokens.expect("tokens")
    }

    pub async fn try_log_out(&self, scope: i32) -> RpcResult<LogoutResponse> {
        self.auth().logout(LogoutRequest { scope }).await
    }

    pub async fn log_out(&self, scope: LogoutScope) {
        self.try_log_out(scope.into()).await.expect("logged out");
    }

    pub async fn list_sessions(&self) -> Vec<Session> {
        let response = self.auth().list_sessions(ListSessionsRequest {}).await;
        response.expect("listed").into_inner().sessions
    }

    pub async fn try_revoke_session(&self, session_id: &str) -> RpcResult<RevokeSessionResponse> {
        let request = RevokeSessionRequest { session_id: session_id.to_owned() };
        self.auth().revoke_session(request).await
    }

    pub async fn try_change_password(
        &self,
        current: &str,
        new: &str,
    ) -> RpcResult<ChangePasswordResponse> {
        let request = ChangePasswordRequest {
            current_password: current.to_owned(),
            new_password: new.to_owned(),
        };
        self.auth().change_password(request).await
    }

    pub async fn change_password(&self, current: &str, new: &str) {
        self.try_change_password(current, new).await.expect("changed");
    }

    pub async fn try_reset_password(
        &self,
        code: &str,
        new: &str,
    ) -> RpcResult<ResetPasswordResponse> {
        let request = ResetPasswordRequest { code: code.to_owned(), new_password: new.to_owned() };
        self.auth().reset_password(request).await
    }

    pub async fn reset_password(&self, code: &str, new: &str) {
        self.try_reset_password(code, new).await.expect("reset");
    }

    pub async fn try_introspect(&self, token: &str) -> RpcResult<IntrospectTokenResponse> {
        let request = IntrospectTokenRequest { access_token: token.to_owned() };
        self.auth().introspect_token(request).await
    }

    pub async fn introspect(&self, token: &str) -> IntrospectTokenResponse {
        self.try_introspect(token).await.expect("a response").into_inner()
    }

    /// Returns `true` if the session of the client is active. Otherwise asserts the reason of
    /// the error. `ListSessions` does not read the row of the user, whose absence would be
    /// another error.
    pub async fn is_session_active(&self) -> bool {
        let result = self.auth().list_sessions(ListSessionsRequest {}).await;
        let is_active = result.is_ok();
        if !is_active {
            let status = assert_unauthenticated(result, "SESSION_REVOKED");
            assert_eq!(status.message(), "Could not validate credentials");
        }
        is_active
    }
}
