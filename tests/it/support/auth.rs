//! The rpcs on sessions, tokens and passwords, in the words that tests need.

use fast_zero::proto::auth::v1::{
    ChangePasswordRequest, ChangePasswordResponse, IntrospectTokenRequest, IntrospectTokenResponse,
    ListSessionsRequest, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, LogoutScope,
    RefreshTokenRequest, RefreshTokenResponse, RevokeSessionRequest, RevokeSessionResponse,
    Session, TokenSet,
};

use super::{Client, assert::assert_unauthenticated, todos::Answer};

impl Client {
    pub async fn try_log_in(&self, login: &str, password: &str) -> Answer<LoginResponse> {
        let request = LoginRequest { login: login.to_owned(), password: password.to_owned() };
        self.auth().login(request).await
    }

    pub async fn try_refresh(&self, token: &str) -> Answer<RefreshTokenResponse> {
        let request = RefreshTokenRequest { refresh_token: token.to_owned() };
        self.auth().refresh_token(request).await
    }

    pub async fn refresh(&self, token: &str) -> TokenSet {
        let response = self.try_refresh(token).await.expect("refreshed");
        response.into_inner().tokens.expect("tokens")
    }

    pub async fn try_log_out(&self, scope: i32) -> Answer<LogoutResponse> {
        self.auth().logout(LogoutRequest { scope }).await
    }

    pub async fn log_out(&self, scope: LogoutScope) {
        self.try_log_out(scope.into()).await.expect("logged out");
    }

    pub async fn list_sessions(&self) -> Vec<Session> {
        let response = self.auth().list_sessions(ListSessionsRequest {}).await;
        response.expect("listed").into_inner().sessions
    }

    pub async fn try_revoke(&self, session_id: &str) -> Answer<RevokeSessionResponse> {
        let request = RevokeSessionRequest { session_id: session_id.to_owned() };
        self.auth().revoke_session(request).await
    }

    pub async fn try_change_password(
        &self,
        current: &str,
        new: &str,
    ) -> Answer<ChangePasswordResponse> {
        let request = ChangePasswordRequest {
            current_password: current.to_owned(),
            new_password: new.to_owned(),
        };
        self.auth().change_password(request).await
    }

    pub async fn change_password(&self, current: &str, new: &str) {
        self.try_change_password(current, new).await.expect("changed");
    }

    pub async fn try_introspect(&self, token: &str) -> Answer<IntrospectTokenResponse> {
        let request = IntrospectTokenRequest { access_token: token.to_owned() };
        self.auth().introspect_token(request).await
    }

    pub async fn introspect(&self, token: &str) -> IntrospectTokenResponse {
        self.try_introspect(token).await.expect("answered").into_inner()
    }

    /// Whether the caller's session lives; if it does not, the refusal says so. It asks
    /// for what needs no row of the user, which might be missed instead.
    pub async fn is_alive(&self) -> bool {
        let answer = self.auth().list_sessions(ListSessionsRequest {}).await;
        let alive = answer.is_ok();
        if !alive {
            let refused = assert_unauthenticated(answer, "SESSION_REVOKED");
            assert_eq!(refused.message(), "Could not validate credentials");
        }
        alive
    }
}
