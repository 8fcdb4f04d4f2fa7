//! Answers of health and reflection, which may be streams.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::Response;
use http_body::Frame;
use tonic::{Status, body::Body};

use crate::error::{self, Error};

/// The body of an answer of health or reflection, which may be a stream: errors at its
/// end get their details, and when it has to end, it ends after what it had to say. It
/// keeps what the call takes up.
pub(super) struct OpenBody<K> {
    /// `None` after the end.
    body: Option<Body>,
    request_id: String,
    /// Comes when it has to end, with the reason.
    ending: Pin<Box<dyn Future<Output = Error> + Send>>,
    _kept: K,
}

impl<K: Send + Unpin + 'static> OpenBody<K> {
    pub(super) fn wrap(
        body: Body,
        request_id: &str,
        ending: impl Future<Output = Error> + Send + 'static,
        kept: K,
    ) -> Body {
        let request_id = request_id.to_owned();
        Body::new(Self { body: Some(body), request_id, ending: Box::pin(ending), _kept: kept })
    }
}

impl<K: Unpin> http_body::Body for OpenBody<K> {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let mut trailers = match Pin::new(body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_trailers() {
                Ok(trailers) => trailers,
                Err(data) => return Poll::Ready(Some(Ok(data))),
            },
            Poll::Ready(end) => return Poll::Ready(end),
            Poll::Pending => {
                let reason = ready!(self.ending.as_mut().poll(context));
                self.body = None;
                let response: Response<Body> = Status::from(reason).into_http();
                response.into_parts().0.headers
            }
        };
        error::complete_details(&mut trailers, &self.request_id);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }
}
