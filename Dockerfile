# syntax=docker/dockerfile:1
# The image of castier and castier-origin. It holds the two programs, the libraries that they load, root certificates and a list of
# components, and runs as the user 65532.
#
#   docker build --tag castier:dev .

ARG RUST=1.89.0
FROM rust:${RUST}-bookworm AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends cmake ca-certificates \
    && rm -rf /var/lib/apt/lists/*
# cargo-auditable writes the list of crates into the programs, where scanners find it; cargo-cyclonedx writes it into a file.
RUN cargo install --locked cargo-auditable@0.7.7 cargo-cyclonedx@0.5.9
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo auditable build --release --locked --bin castier --bin castier-origin \
    && cargo cyclonedx --format json --override-filename sbom.cdx \
    && cp proxy/sbom.cdx.json castier.cdx.json && cp origin/sbom.cdx.json castier-origin.cdx.json \
    && scripts/image_root.sh target/release /image --sbom castier.cdx.json --sbom castier-origin.cdx.json

FROM scratch AS castier
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=""
LABEL org.opencontainers.image.title="castier" \
      org.opencontainers.image.description="A caching tier in front of a content-addressed store" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image /
# A volume that is empty when it is mounted here gets this owner.
COPY --from=build --chown=65532:65532 /image/var/lib /var/lib
USER 65532:65532
WORKDIR /var/lib/castier
# Clients, peers, the admin listener. castier-origin: 9000, and 9001 for its admin listener.
EXPOSE 8080 8081 8082 9000 9001
# For castier; castier-origin needs http://127.0.0.1:9001/readyz instead.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["/usr/bin/castier", "--health", "http://127.0.0.1:8082/readyz"]
ENTRYPOINT ["/usr/bin/castier"]
