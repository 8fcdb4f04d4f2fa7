//! The service of the tests of server streams: a handler and nothing else.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};

use tonic::{Request, Response, Status};

use super::{
    caller::Caller,
    error::Error,
    proto::test::v1::{
        CountRequest, CountResponse,
        test_service_server::{TestService, TestServiceServer},
    },
};

/// Returns the service.
pub(crate) fn server() -> TestServiceServer<Counter> {
    TestServiceServer::new(Counter::default())
}

#[derive(Debug, Default)]
pub(crate) struct Counter {
    produced: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl TestService for Counter {
    type CountStream = Numbers;

    async fn count(&self, request: Request<CountRequest>) -> Result<Response<Numbers>, Status> {
        Caller::from_request(&request)?;
        let request = request.into_inner();
        Ok(Response::new(Numbers { request, number: 0, produced: self.produced.clone() }))
    }
}

/// The numbers, each produced when it is polled for.
#[derive(Debug)]
pub(crate) struct Numbers {
    request: CountRequest,
    number: u32,
    produced: Arc<AtomicU32>,
}

impl tokio_stream::Stream for Numbers {
    type Item = Result<CountResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.request.messages != 0 && self.number == self.request.messages {
            let failure = || Err(Error::internal("the test asked for a failure").into());
            return Poll::Ready(std::mem::take(&mut self.request.then_fails).then(failure));
        }
        if self.request.then_silent && self.number > 0 {
            return Poll::Pending;
        }
        self.number += 1;
        Poll::Ready(Some(Ok(CountResponse {
            number: self.number,
            produced: self.produced.fetch_add(1, Ordering::Relaxed) + 1,
            padding: vec![0; self.request.padding_bytes as usize],
        })))
    }
}
