//! gRPC server reflection (`grpc/reflection/v1/reflection.proto`).
//!
//! The service of tonic-reflection ends its stream with the first error, and answers no request
//! about extensions. This one returns `error_response`, and the stream goes on. Only the types of
//! the messages come from tonic-reflection.

use std::{
    collections::{BTreeMap, HashMap},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request as HttpRequest, Uri};
use prost::{DecodeError, Message};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
};
use tonic::{
    Code, Request, Response, Status, Streaming, codegen::tokio_stream::Stream, server::NamedService,
};
use tonic_reflection::{
    pb::v1::{
        ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
        ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    },
    server::v1::{ServerReflection, ServerReflectionServer},
};
use tower::Service;

/// A descriptor set whose files stay encoded: decoded ones lose custom options.
#[derive(Clone, PartialEq, Message)]
struct EncodedFileSet {
    #[prost(bytes = "vec", repeated, tag = "1")]
    file: Vec<Vec<u8>>,
}

/// Returns the services of both versions, which describe the files of these descriptor sets.
///
/// # Errors
/// If a descriptor set cannot be read.
pub(crate) fn services(
    descriptor_sets: &[&[u8]],
    max_request_bytes: usize,
) -> Result<(ServerReflectionServer<Reflection>, V1Alpha), DecodeError> {
    let mut descriptors = Descriptors::default();
    for set in descriptor_sets {
        for encoded in EncodedFileSet::decode(*set)?.file {
            descriptors.add(encoded)?;
        }
    }
    let service = ServerReflectionServer::new(Reflection(Arc::new(descriptors)));
    let v1 = service.max_decoding_message_size(max_request_bytes);
    Ok((v1.clone(), V1Alpha(v1)))
}

/// The files of the API, and where each name is declared.
#[derive(Debug, Default)]
struct Descriptors {
    /// The encoded files, by name.
    files: HashMap<String, Vec<u8>>,
    /// The name of the file that declares a symbol.
    symbols: HashMap<String, String>,
    /// The name of the file that extends a type with a field number.
    extensions: BTreeMap<(String, i32), String>,
    services: Vec<String>,
}

impl Descriptors {
    fn add(&mut self, encoded: Vec<u8>) -> Result<(), DecodeError> {
        let file = FileDescriptorProto::decode(&*encoded)?;
        let (name, package) = (file.name(), file.package());
        if self.files.contains_key(name) {
            return Ok(());
        }
        for message in &file.message_type {
            self.add_message(name, package, message);
        }
        for declared in &file.enum_type {
            self.add_enum(name, package, declared);
        }
        self.add_extensions(name, package, &file.extension);
        for service in &file.service {
            let service_name = self.add_symbol(name, package, service.name());
            for method in &service.method {
                self.add_symbol(name, &service_name, method.name());
            }
            self.services.push(service_name);
        }
        self.files.insert(name.to_owned(), encoded);
        Ok(())
    }

    /// Adds a symbol, and returns its full name.
    fn add_symbol(&mut self, file: &str, scope: &str, name: &str) -> String {
        let full_name = if scope.is_empty() { name.to_owned() } else { format!("{scope}.{name}") };
        self.symbols.insert(full_name.clone(), file.to_owned());
        full_name
    }

    fn add_message(&mut self, file: &str, scope: &str, message: &DescriptorProto) {
        let full_name = self.add_symbol(file, scope, message.name());
        for nested in &message.nested_type {
            self.add_message(file, &full_name, nested);
        }
        for declared in &message.enum_type {
            self.add_enum(file, &full_name, declared);
        }
        for field in &message.field {
            self.add_symbol(file, &full_name, field.name());
        }
        for oneof in &message.oneof_decl {
            self.add_symbol(file, &full_name, oneof.name());
        }
        self.add_extensions(file, &full_name, &message.extension);
    }

    /// The values of an enum are in the scope of the enum, not below it.
    fn add_enum(&mut self, file: &str, scope: &str, declared: &EnumDescriptorProto) {
        self.add_symbol(file, scope, declared.name());
        for value in &declared.value {
            self.add_symbol(file, scope, value.name());
        }
    }

    fn add_extensions(&mut self, file: &str, scope: &str, extensions: &[FieldDescriptorProto]) {
        for extension in extensions {
            self.add_symbol(file, scope, extension.name());
            let extendee = extension.extendee().trim_start_matches('.').to_owned();
            self.extensions.insert((extendee, extension.number()), file.to_owned());
        }
    }

    fn respond(&self, request: ServerReflectionRequest) -> ServerReflectionResponse {
        let response = match &request.message_request {
            None => Err((Code::InvalidArgument, "message_request is not set".to_owned())),
            Some(message) => {
                self.find(message).ok_or_else(|| (Code::NotFound, "not found".to_owned()))
            }
        };
        let response = response.unwrap_or_else(|(code, error_message)| {
            MessageResponse::ErrorResponse(ErrorResponse { error_code: code as i32, error_message })
        });
        ServerReflectionResponse {
            valid_host: request.host.clone(),
            original_request: Some(request),
            message_response: Some(response),
        }
    }

    fn find(&self, request: &MessageRequest) -> Option<MessageResponse> {
        let file = match request {
            MessageRequest::FileByFilename(name) => Some(name),
            MessageRequest::FileContainingSymbol(symbol) => self.symbols.get(symbol),
            MessageRequest::FileContainingExtension(extension) => {
                let key = (extension.containing_type.clone(), extension.extension_number);
                self.extensions.get(&key)
            }
            MessageRequest::AllExtensionNumbersOfType(name) => {
                return self.extension_numbers(name);
            }
            MessageRequest::ListServices(_) => {
                let service =
                    self.services.iter().map(|name| ServiceResponse { name: name.clone() });
                let service = service.collect();
                return Some(MessageResponse::ListServicesResponse(ListServiceResponse {
                    service,
                }));
            }
        };
        let file_descriptor_proto = vec![self.files.get(file?)?.clone()];
        let response = FileDescriptorResponse { file_descriptor_proto };
        Some(MessageResponse::FileDescriptorResponse(response))
    }

    fn extension_numbers(&self, base_type: &str) -> Option<MessageResponse> {
        self.symbols.get(base_type)?;
        let of_type = self.extensions.keys().filter(|(extendee, _)| extendee == base_type);
        let response = ExtensionNumberResponse {
            base_type_name: base_type.to_owned(),
            extension_number: of_type.map(|(_, number)| *number).collect(),
        };
        Some(MessageResponse::AllExtensionNumbersResponse(response))
    }
}

/// The service.
#[derive(Debug)]
pub(crate) struct Reflection(Arc<Descriptors>);

#[tonic::async_trait]
impl ServerReflection for Reflection {
    type ServerReflectionInfoStream = Responses;

    async fn server_reflection_info(
        &self,
        request: Request<Streaming<ServerReflectionRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let descriptors = self.0.clone();
        Ok(Response::new(Responses { requests: request.into_inner(), descriptors }))
    }
}

/// The responses of a stream, each produced when the client has room for it.
#[derive(Debug)]
pub(crate) struct Responses {
    requests: Streaming<ServerReflectionRequest>,
    descriptors: Arc<Descriptors>,
}

impl Stream for Responses {
    type Item = Result<ServerReflectionResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let request = ready!(Pin::new(&mut self.requests).poll_next(context));
        Poll::Ready(request.map(|request| request.map(|request| self.descriptors.respond(request))))
    }
}

/// The service under its older name. The messages of both versions are equal.
#[derive(Clone, Debug)]
pub(crate) struct V1Alpha(ServerReflectionServer<Reflection>);

impl NamedService for V1Alpha {
    const NAME: &'static str = "grpc.reflection.v1alpha.ServerReflection";
}

impl<B> Service<HttpRequest<B>> for V1Alpha
where
    ServerReflectionServer<Reflection>: Service<HttpRequest<B>>,
{
    type Response = <ServerReflectionServer<Reflection> as Service<HttpRequest<B>>>::Response;
    type Error = <ServerReflectionServer<Reflection> as Service<HttpRequest<B>>>::Error;
    type Future = <ServerReflectionServer<Reflection> as Service<HttpRequest<B>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: HttpRequest<B>) -> Self::Future {
        let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        *request.uri_mut() = Uri::from_static(path);
        self.0.call(request)
    }
}
