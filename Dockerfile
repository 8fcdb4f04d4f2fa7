# syntax=docker/dockerfile:1

FROM rust:1.95-trixie AS build
WORKDIR /fast-zero
COPY . .
ARG FASTZERO_COMMIT=unknown
ARG PROFILE=release
ARG TARGETPLATFORM
# The caches contain compiled dependencies, so a change of the sources or of one dependency does
# not recompile the others. cargo compares modification times, and the cache may be newer than the
# checkout, so `touch` updates the times.
RUN --mount=type=cache,id=fast-zero-registry,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=fast-zero-$TARGETPLATFORM,target=/fast-zero/target,sharing=locked \
    find . -path ./target -prune -o -type f -exec touch {} + \
    && cargo build --package fast-zero --profile "$PROFILE" --locked --no-default-features --features jemalloc \
    && cp "target/$PROFILE/fast-zero" /bin/fast-zero

FROM gcr.io/distroless/cc-debian13:nonroot
ARG FASTZERO_COMMIT=unknown
LABEL org.opencontainers.image.title="fast-zero" \
      org.opencontainers.image.description="Users, authentication and todos over gRPC, on PostgreSQL" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.revision=$FASTZERO_COMMIT
COPY --from=ghcr.io/grpc-ecosystem/grpc-health-probe:v0.4.56 /ko-app/grpc-health-probe /bin/grpc_health_probe
COPY --from=build /bin/fast-zero /bin/fast-zero
ENV LISTEN_ADDR=0.0.0.0:50051
EXPOSE 50051
USER 65532:65532
STOPSIGNAL SIGTERM
# Twice the timeout of the subcommand itself.
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=2 \
    CMD ["/bin/fast-zero", "healthcheck"]
ENTRYPOINT ["/bin/fast-zero"]
