//! The image, `compose.yaml` and the Debian package.

use crate::tools::{Running, bin, eventually, parse_yaml, read, root, run, skipped, stdout, text, tool};
use serde_json::Value;
use std::{
    env, fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `--check-config` of a file, with these variables. What it says.
fn check(program: &str, file: &Path, variables: &[(&str, &str)]) -> String {
    let dir = TempDir::new().unwrap();
    let mut command = Command::new(bin().join(program));
    command.arg("--check-config").arg("--config").arg(file).envs(variables.iter().copied());
    if program == "castier" {
        // The directory is the container's or the package's.
        command.env("CASTIER_FILL__SPOOL_DIR", dir.path());
    }
    let output = run(&mut command, b"");
    assert!(output.status.success(), "{}: {}", file.display(), text(&output));
    text(&output)
}

// ---- the image ----

/// The file system of the image, made of the programs under test.
fn image_root(dir: &Path) -> PathBuf {
    let image = dir.join("image");
    let sbom = dir.join("castier.cdx.json");
    fs::write(&sbom, "{}").unwrap();
    stdout(Command::new(root().join("scripts/image_root.sh")).arg(bin()).arg(&image).arg("--sbom").arg(sbom), b"");
    image
}

#[test]
fn the_image_has_all_that_its_programs_need() {
    let dir = TempDir::new().unwrap();
    let image = image_root(dir.path());
    for file in [
        "etc/ssl/certs/ca-certificates.crt",
        "etc/nsswitch.conf",
        "usr/share/doc/castier/LICENSE",
        "usr/share/doc/castier/castier.cdx.json",
    ] {
        assert!(image.join(file).is_file(), "{file}");
    }
    if !is_root() {
        return skipped("only root may start a program in another root directory");
    }
    for program in ["castier", "castier-origin"] {
        let mut chroot = Command::new("chroot");
        chroot.args(["--userspec", "65532:65532"]).arg(&image).arg(format!("/usr/bin/{program}"));
        let version = stdout(chroot.arg("--version"), b"");
        assert_eq!(version.trim(), format!("{program} {}", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn the_health_check_of_the_image_tells_life_from_death() {
    if !stdout(Command::new(bin().join("castier")).arg("--help"), b"").contains("--health") {
        return skipped("castier has no --health");
    }
    if !is_root() {
        return skipped("only root may start a program in another root directory");
    }
    let dir = TempDir::new().unwrap();
    let image = image_root(dir.path());
    let mut command = Command::new(bin().join("castier"));
    let mut castier = Running::start(command.envs([("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0"), ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0")]));
    let admin = castier.address("listening admin ");
    for program in ["castier", "castier-origin"] {
        let check = || {
            let mut chroot = Command::new("chroot");
            chroot.args(["--userspec", "65532:65532"]).arg(&image).arg(format!("/usr/bin/{program}"));
            run(chroot.arg("--health").arg(format!("http://{admin}/readyz")), b"").status.code()
        };
        eventually(&format!("{program} finds it ready"), || (check() == Some(0)).then_some(()));
    }
    drop(castier);
    let mut chroot = Command::new("chroot");
    chroot.args(["--userspec", "65532:65532"]).arg(&image).args(["/usr/bin/castier", "--health", &format!("http://{admin}/readyz")]);
    assert_eq!(run(&mut chroot, b"").status.code(), Some(1));
}

#[test]
fn the_final_stage_builds_and_says_what_it_is() {
    let dockerfile = read("Dockerfile");
    let (first, last) = dockerfile.split_once("\nFROM scratch AS castier\n").expect("a final stage from scratch");
    assert!(last.contains(&format!("ARG VERSION={}\n", env!("CARGO_PKG_VERSION"))), "the label has the version of the programs");
    assert!(
        first.contains(&format!("ARG RUST={}", env!("CARGO_PKG_RUST_VERSION"))),
        "built with the oldest Rust that is promised, or a patch of it"
    );
    for part in ["cargo auditable build --release --locked", "cargo cyclonedx", "scripts/image_root.sh target/release /image"] {
        assert!(first.contains(part), "{part}");
    }
    let Some(buildah) = tool("buildah") else { return };
    if !is_root() {
        return skipped("buildah needs root here");
    }
    let dir = TempDir::new().unwrap();
    let image = image_root(dir.path());
    // The first stage needs an image from a registry. The folder that it would have made stands in for it.
    let stage = format!("FROM scratch AS castier\n{last}")
        .replace("--from=build ", "")
        .replace("/image/var/lib", "/var/lib")
        .replace("COPY /image /", "COPY / /");
    fs::write(dir.path().join("Dockerfile"), &stage).unwrap();
    let storage = dir.path().join("storage");
    let buildah = |args: &[&str]| {
        let mut command = Command::new(&buildah);
        let options = ["--storage-driver", "vfs", "--root", storage.to_str().unwrap(), "--runroot", storage.join("run").to_str().unwrap()]
            .map(str::to_owned);
        command.args(options).args(args);
        command
    };
    let file = dir.path().join("Dockerfile");
    let build = ["build", "--format", "docker", "--isolation", "chroot", "--build-arg", "REVISION=abc", "--tag", "castier:test", "--file"];
    let built = run(buildah(&build).arg(&file).arg(&image), b"");
    if !built.status.success() && text(&built).contains("operation not permitted") {
        return skipped(&format!("buildah may not work here: {}", text(&built)));
    }
    assert!(built.status.success(), "{}", text(&built));
    let told = stdout(&mut buildah(&["inspect", "--type", "image", "castier:test"]), b"");
    let told: Value = serde_json::from_str(&told).unwrap();
    let config = &told["Docker"]["config"];
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(config["Entrypoint"][0], "/usr/bin/castier");
    assert_eq!(config["Healthcheck"]["Test"][2], "--health", "{config}");
    let label = |name: &str| &config["Labels"][format!("org.opencontainers.image.{name}")];
    assert_eq!((label("title").as_str(), label("version").as_str()), (Some("castier"), Some(env!("CARGO_PKG_VERSION"))));
    assert_eq!((label("revision").as_str(), label("licenses").as_str()), (Some("abc"), Some("Apache-2.0")));
}

// ---- compose.yaml ----

#[test]
fn compose_is_sound() {
    if let Some(compose) = tool("docker-compose") {
        let files = |names: &[&str]| names.iter().flat_map(|name| ["--file".into(), root().join(name)]).collect::<Vec<_>>();
        for names in [&["compose.yaml"][..], &["compose.yaml", "compose.seaweedfs.yaml"]] {
            stdout(Command::new(&compose).args(files(names)).args(["config", "--quiet"]), b"");
        }
    }
    let Some(documents) = parse_yaml(&read("compose.yaml")) else { return };
    let services = documents[0]["services"].as_object().unwrap();
    let mut secrets = 0;
    for (name, service) in services {
        let image = service["image"].as_str().unwrap();
        let (repository, tag) = image.rsplit_once(':').unwrap_or_else(|| panic!("{name}: {image} is not pinned"));
        assert!(repository == "castier" || tag.trim_start_matches('v').split('.').count() >= 3, "{name}: {image} is not pinned");
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let source = volume.as_str().unwrap().split(':').next().unwrap();
            assert!(
                !source.starts_with('.') || root().join(source).exists(),
                "{name}: {source} is not there; Docker would make a folder of that name"
            );
        }
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(port.as_str().unwrap().starts_with("127.0.0.1:"), "{name}: {port} is open to the network");
        }
        secrets += service["secrets"].as_array().map_or(0, Vec::len);
    }
    assert_eq!(secrets, 3, "each node has the secret");
    assert!(read(".gitignore").contains("castier-data"), "the secret is never in git");

    let nodes = ["node-1", "node-2", "node-3"];
    let dir = TempDir::new().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    for node in nodes {
        let advertise = services[node]["environment"]["CASTIER_CLUSTER__ADVERTISE"].as_str().unwrap();
        assert_eq!(advertise, format!("{node}:8081"));
        let variables = [("CASTIER_CLUSTER__ADVERTISE", advertise), ("CASTIER_CLUSTER__SECRET_FILE", secret.to_str().unwrap())];
        check("castier", &root().join("config/compose/castier.toml"), &variables);
        for file in ["config/compose/castier.toml", "config/compose/nginx.conf", "grafana/prometheus/prometheus.yml"] {
            assert!(read(file).contains(&format!("{node}:")), "{file} lacks {node}");
        }
    }
    check("castier-origin", &root().join("config/compose/castier-origin.toml"), &[]);
    assert!(read("config/compose/castier.toml").contains("url = \"http://origin:9000\""));
    if let Some(promtool) = tool("promtool") {
        stdout(
            Command::new(promtool).args(["check", "config", "--syntax-only"]).arg(root().join("grafana/prometheus/prometheus.yml")),
            b"",
        );
    }
}

/// What compose.seaweedfs.yaml changes: the nodes ask the bucket, and nothing else is left of castier-origin.
#[test]
fn compose_with_seaweedfs_is_sound() {
    let Some(compose) = tool("docker-compose") else { return };
    let files = ["--file", "compose.yaml", "--file", "compose.seaweedfs.yaml", "config"];
    let Some(documents) = parse_yaml(&stdout(Command::new(compose).current_dir(root()).args(files), b"")) else { return };
    let services = &documents[0]["services"];
    let store = &services["origin"];
    assert_eq!(store["image"].as_str().unwrap(), container_image("k8s/components/seaweedfs/seaweedfs.yaml"), "one version everywhere");
    assert!(store["ports"].is_null() && store["cap_drop"][0] == "ALL" && store["read_only"] == true, "{store}");
    assert_eq!(store["entrypoint"][0], "/usr/bin/weed");
    let dir = TempDir::new().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "0123456789abcdef0123456789abcdef\n").unwrap();
    for node in ["node-1", "node-2", "node-3"] {
        let mut variables: Vec<_> = services[node]["environment"].as_object().unwrap().iter().collect();
        variables.retain(|(name, _)| !name.contains("SECRET"));
        let mut variables: Vec<_> = variables.into_iter().map(|(name, value)| (name.as_str(), value.as_str().unwrap())).collect();
        assert!(
            variables.contains(&("CASTIER_ORIGIN__URL", "s3://blobs")) && variables.iter().any(|(name, _)| name.ends_with("ADVERTISE"))
        );
        let file = secret.to_str().unwrap();
        variables.extend([("CASTIER_CLUSTER__SECRET_FILE", file), ("CASTIER_ORIGIN__S3__SECRET_ACCESS_KEY_FILE", file)]);
        check("castier", &root().join("config/compose/castier.toml"), &variables);
        let secrets = services[node]["secrets"].to_string();
        assert!(secrets.contains("castier-peer") && secrets.contains("castier-store") && !secrets.contains("store-s3"), "{secrets}");
    }
}

/// The image in a manifest that has one.
fn container_image(manifest: &str) -> String {
    let text = read(manifest);
    text.lines().find_map(|line| line.trim().strip_prefix("image: ")).unwrap().to_owned()
}

#[test]
fn nginx_passes_everything_on_as_it_comes() {
    let (Some(nginx), Some(curl)) = (tool("nginx"), tool("curl")) else { return };
    let dir = TempDir::new().unwrap();
    let mut castier = Running::start(
        Command::new(bin().join("castier")).envs([("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0"), ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0")]),
    );
    let node = castier.address("listening public ");
    let front = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let temporary = dir.path().to_str().unwrap();
    let mut conf =
        read("config/compose/nginx.conf").replace("listen 8080", &format!("listen {front}")).replace("/tmp/", &format!("{temporary}/"));
    for name in ["node-1", "node-2", "node-3"] {
        conf = conf.replace(&format!("{name}:8080"), &node.to_string());
    }
    let file = dir.path().join("nginx.conf");
    fs::write(&file, conf).unwrap();
    let mut nginx = Running::start(Command::new(nginx).arg("-c").arg(&file).args(["-e", "stderr", "-g", "daemon off;"]));
    nginx.wait_for(front);
    // Larger than any limit or buffer that nginx has by default.
    let blob: Vec<u8> = (0..32_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let file = dir.path().join("blob");
    fs::write(&file, &blob).unwrap();
    let get = |args: &[&str]| run(Command::new(&curl).args(["--silent", "--show-error", "--fail", "--max-time", "60"]).args(args), b"");
    let post = get(&["--data-binary", &format!("@{}", file.display()), &format!("http://{front}/cas")]);
    let told: Value = serde_json::from_slice(&post.stdout).unwrap_or_else(|error| panic!("{error}: {}{}", text(&post), nginx.log()));
    let url = format!("http://{front}/cas/{}", told["digest"].as_str().unwrap());
    assert!(get(&[&url]).stdout == blob);
    assert_eq!(get(&["--range", "1000000-1000003", &url]).stdout, blob[1_000_000..=1_000_003]);
    let etag = format!("If-None-Match: \"{}\"", told["digest"].as_str().unwrap());
    assert_eq!(get(&["--header", &etag, "--write-out", "%{http_code}", &url]).stdout, b"304");
}

// ---- the Debian package ----

#[test]
fn the_units_are_hardened() {
    let Some(analyze) = tool("systemd-analyze") else { return };
    for unit in ["castier", "castier-origin"] {
        let file = root().join(format!("packaging/systemd/{unit}.service"));
        let told = run(Command::new(&analyze).args(["security", "--offline=true", "--no-pager"]).arg(&file), b"");
        let told = text(&told);
        let Some(level) = told.rsplit_once(": ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<f64>().ok()) else {
            return skipped(&format!("systemd-analyze judges no unit here: {told}"));
        };
        assert!(level <= 2.0, "{unit}: exposure {level}; systemd-analyze security {}", file.display());
    }
}

#[test]
fn the_packages_configuration_is_sound() {
    for program in ["castier", "castier-origin"] {
        check(program, &root().join(format!("config/debian/{program}.toml")), &[]);
        let unit = read(&format!("packaging/systemd/{program}.service"));
        assert!(unit.contains(&format!("ExecStart=/usr/bin/{program} --config /etc/castier/{program}.toml\n")));
        // What it writes is below the only directory that it may write to.
        let config = read(&format!("config/debian/{program}.toml"));
        let paths = config.split('"').filter(|text| text.trim_start_matches("embedded:").starts_with('/'));
        for path in paths {
            assert!(path.trim_start_matches("embedded:").starts_with(&format!("/var/lib/{program}")), "{path}");
        }
    }
}

#[test]
fn the_package_installs() {
    let Some(cargo_deb) = tool("cargo-deb") else { return };
    let dir = TempDir::new().unwrap();
    let package = dir.path().join("castier.deb");
    // What was built for the tests; a release is stripped.
    let target = bin().parent().unwrap();
    let mut command = Command::new(cargo_deb);
    command.current_dir(root()).env("CARGO_TARGET_DIR", target).args([
        "-p",
        "castier",
        "--no-build",
        "--no-strip",
        "--fast",
        "--locked",
        "--output",
    ]);
    stdout(command.arg(&package), b"");
    let Some(dpkg_deb) = tool("dpkg-deb") else { return };
    let field = |name: &str| stdout(Command::new(&dpkg_deb).arg("--field").arg(&package).arg(name), b"").trim().to_owned();
    assert_eq!(field("Package"), "castier");
    assert!(field("Version").starts_with(env!("CARGO_PKG_VERSION")), "{}", field("Version"));
    assert!(field("Depends").contains("libc6") && field("Depends").contains("adduser"), "{}", field("Depends"));
    let unpacked = dir.path().join("unpacked");
    stdout(Command::new(&dpkg_deb).arg("--raw-extract").arg(&package).arg(&unpacked), b"");
    for file in [
        "usr/bin/castier",
        "usr/bin/castier-origin",
        "usr/bin/castier-load",
        "etc/castier/castier.toml",
        "usr/share/doc/castier/castier.toml",
    ] {
        assert!(unpacked.join(file).is_file(), "{file} is missing");
    }
    let units = ["castier.service", "castier-origin.service"].map(|unit| {
        let found = ["usr/lib/systemd/system", "lib/systemd/system"].map(|folder| unpacked.join(folder).join(unit));
        found.into_iter().find(|file| file.is_file()).unwrap_or_else(|| panic!("{unit} is missing"))
    });
    assert_eq!(fs::read_to_string(&units[0]).unwrap(), read("packaging/systemd/castier.service"));
    let conffiles = fs::read_to_string(unpacked.join("DEBIAN/conffiles")).unwrap();
    assert!(conffiles.contains("/etc/castier/castier.toml") && conffiles.contains("/etc/castier/castier-origin.toml"), "{conffiles}");
    let postinst = fs::read_to_string(unpacked.join("DEBIAN/postinst")).unwrap();
    assert!(
        postinst.contains("adduser --system") && postinst.contains("castier.service") && !postinst.contains("#DEBHELPER#"),
        "{postinst}"
    );
    check("castier", &unpacked.join("etc/castier/castier.toml"), &[]);
}
