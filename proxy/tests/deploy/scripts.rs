//! The scripts for containers and Kubernetes, with programs in place of kubectl, docker, helm and minikube that write down how they are called.

use crate::tools::{Running, eventually, interruptible, root, run, stdout, text, tool};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

const SCRIPTS: [&str; 6] = ["docker_start.sh", "enable_ingress.sh", "apply_k8s.sh", "monitoring.sh", "port_forward.sh", "image_root.sh"];

/// Writes its name and arguments down. `kubectl` keeps secrets in files, and remembers what came by its standard input.
const STAND_IN: &str = r#"#!/bin/bash
cd "$(dirname "$0")" || exit 1
name=$(basename "$0")
echo "$name $*" >>calls
case "$name $*" in
  "kubectl config current-context") cat context 2>/dev/null ;;
  "kubectl get secret "*) test -e secret ;;
  *" secret generic "*) test ! -e secret && cat >secret ;;
  "kubectl diff "*) exit 1 ;;
  "kubectl port-forward "*) echo $$ >>forwards; exec sleep 300 ;;
  "docker info") test ! -e no-daemon ;;
esac
"#;

/// A copy of what the scripts need, and the stand-ins.
struct World {
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let project = dir.path().join("project");
        fs::create_dir_all(&project).unwrap();
        for part in ["scripts", "k8s", "config/kubernetes", "grafana", "compose.yaml", "compose.seaweedfs.yaml"] {
            let to = project.join(part);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            stdout(Command::new("cp").arg("-r").arg(root().join(part)).arg(to), b"");
        }
        let world = Self { dir };
        fs::create_dir(world.path("bin")).unwrap();
        for name in ["kubectl", "docker", "helm", "minikube"] {
            let file = world.path("bin").join(name);
            fs::write(&file, STAND_IN).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        world.context("minikube");
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn context(&self, name: &str) {
        fs::write(self.path("bin/context"), format!("{name}\n")).unwrap();
    }

    fn command(&self, script: &str, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("project/scripts").join(script));
        command.args(args).env("PATH", format!("{}:/usr/bin:/bin", self.path("bin").display()));
        command
    }

    /// Runs a script, which must succeed. Its output, and the calls that it made.
    fn ok(&self, script: &str, args: &[&str]) -> (String, Vec<String>) {
        let _ = fs::remove_file(self.path("bin/calls"));
        let output = run(&mut self.command(script, args), b"");
        assert!(output.status.success(), "{script} {args:?}: {}", text(&output));
        (text(&output), self.calls())
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("bin/calls")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn output(&self, script: &str, args: &[&str]) -> Output {
        run(&mut self.command(script, args), b"")
    }
}

#[test]
fn shellcheck_has_nothing_to_say() {
    let Some(shellcheck) = tool("shellcheck") else { return };
    let scripts = fs::read_dir(root().join("scripts")).unwrap().map(|entry| entry.unwrap().path());
    let is_shell =
        |path: &PathBuf| path.is_file() && fs::read_to_string(path).is_ok_and(|text| text.lines().next().unwrap().contains("bash"));
    let scripts: Vec<_> = scripts.filter(is_shell).chain([root().join("packaging/debian/postinst"), root().join(".ci/run")]).collect();
    assert!(scripts.len() > SCRIPTS.len());
    // The only file that a script reads beside itself is named by its path from the top.
    stdout(Command::new(shellcheck).current_dir(root()).arg("--external-sources").args(&scripts), b"");
}

#[test]
fn every_script_explains_itself_and_refuses_what_it_does_not_know() {
    let world = World::new();
    for script in SCRIPTS {
        let (help, calls) = world.ok(script, &["--help"]);
        assert!(help.contains(&format!("scripts/{script}")) && !help.contains("set -euo") && calls.is_empty(), "{script}: {help}");
        let name = script.trim_end_matches(".sh");
        for wrong in ["--surprise", "surprise"] {
            let output = world.output(script, &[wrong]);
            let told = text(&output);
            assert_eq!(output.status.code(), Some(2), "{script} {wrong}: {told}");
            assert!(told.starts_with(&format!("{name}: ")) && told.lines().count() == 1 && told.contains("--help"), "{told}");
        }
    }
    assert!(world.calls().is_empty());
}

#[test]
fn a_dry_run_changes_nothing() {
    let world = World::new();
    let runs: [(&str, &[&str], &str); 11] = [
        ("docker_start.sh", &[], "docker build"),
        ("docker_start.sh", &["--stop"], "down"),
        ("docker_start.sh", &["--seaweedfs"], "compose.seaweedfs.yaml up"),
        ("docker_start.sh", &["--minikube"], "minikube image build"),
        ("enable_ingress.sh", &[], "minikube addons enable ingress"),
        ("enable_ingress.sh", &["--helm"], "helm upgrade --install ingress-nginx"),
        ("apply_k8s.sh", &["production"], "kubectl apply --server-side -k"),
        ("apply_k8s.sh", &["seaweedfs"], "create secret generic castier-store"),
        ("apply_k8s.sh", &["--delete"], "kubectl delete"),
        ("monitoring.sh", &[], "helm upgrade --install kube-prometheus-stack"),
        ("port_forward.sh", &["grafana"], "kubectl port-forward"),
    ];
    for (script, args, says) in runs {
        let args = [args, &["--dry-run"]].concat();
        let (told, calls) = world.ok(script, &args);
        assert!(told.contains(says), "{script} {args:?}: {told}");
        // A question, and no more.
        assert!(calls.iter().all(|call| call == "kubectl config current-context"), "{script}: {calls:?}");
    }
    assert!(!world.path("project/castier-data").exists() && !world.path("bin/secret").exists());
}

#[test]
fn castier_is_applied_again_and_again_with_one_secret() {
    let world = World::new();
    let (_, first) = world.ok("apply_k8s.sh", &[]);
    let secret = fs::read_to_string(world.path("bin/secret")).unwrap();
    assert!(secret.trim().len() == 64 && secret.trim().bytes().all(|byte| byte.is_ascii_hexdigit()), "{secret}");
    assert!(first.iter().all(|call| !call.contains(secret.trim())), "arguments can be read by everybody");
    let (_, second) = world.ok("apply_k8s.sh", &[]);
    assert_eq!(fs::read_to_string(world.path("bin/secret")).unwrap(), secret);
    let create = "kubectl create secret generic castier-peer --namespace cas --from-file=peer=/dev/stdin";
    assert_eq!(first.iter().filter(|call| *call == create).count(), 1, "{first:?}");
    let without: Vec<_> = first.iter().filter(|call| *call != create).cloned().collect();
    assert_eq!(second, without);
    let order = [
        "namespace.yaml",
        "get secret",
        "apply --server-side -k",
        "rollout status statefulset/castier-origin",
        "rollout status statefulset/castier ",
    ];
    let at = order.map(|what| second.iter().position(|call| call.contains(what)).unwrap_or_else(|| panic!("{what}: {second:?}")));
    assert!(at.is_sorted(), "{second:?}");

    // The key of a store of its own, which the real kubectl reads from the two files.
    fs::write(
        world.path("bin/kubectl"),
        STAND_IN.replace(
            "  \"kubectl get secret \"*)",
            r#"  *" secret generic castier-store "*)
    for argument; do case $argument in --from-file=*) file=${argument#--from-file=}; cat "${file#*=}" >"store-${file%%=*}" ;; esac; done ;;
  "kubectl get secret castier-store "*) test -e store-secret ;;
  "kubectl get secret "*)"#,
        ),
    )
    .unwrap();
    fs::write(world.path("bin/secret"), &secret).unwrap();
    let (_, first) = world.ok("apply_k8s.sh", &["seaweedfs"]);
    assert!(first.iter().any(|call| call.contains("rollout status statefulset/seaweedfs")), "{first:?}");
    assert!(!first.iter().any(|call| call.contains("castier-origin")), "{first:?}");
    let key = fs::read_to_string(world.path("bin/store-secret")).unwrap();
    let identities: serde_json::Value = serde_json::from_str(&fs::read_to_string(world.path("bin/store-s3.json")).unwrap()).unwrap();
    assert!(key.len() == 64 && identities["identities"][0]["credentials"][0]["secretKey"] == key, "{identities}");
    assert!(first.iter().all(|call| !call.contains(&key)), "arguments can be read by everybody");
    world.ok("apply_k8s.sh", &["seaweedfs"]);
    assert_eq!(fs::read_to_string(world.path("bin/store-secret")).unwrap(), key, "it is made once");

    // A difference is no failure; a folder that is not there is.
    world.ok("apply_k8s.sh", &["--diff", "production"]);
    assert_eq!(world.output("apply_k8s.sh", &["nowhere"]).status.code(), Some(2));
}

#[test]
fn deleting_leaves_the_namespace() {
    let world = World::new();
    let Some(kubectl) = tool("kubectl") else { return };
    // The real one builds the overlay; what would be deleted is written down.
    let stand_in =
        format!("#!/bin/bash\nif [[ $1 == kustomize ]]; then exec {} \"$@\"; fi\ncat >\"$(dirname \"$0\")/deleted\"\n", kubectl.display());
    fs::write(world.path("bin/kubectl"), stand_in).unwrap();
    world.ok("apply_k8s.sh", &["--delete", "production"]);
    let deleted = fs::read_to_string(world.path("bin/deleted")).unwrap();
    assert!(!deleted.contains("kind: Namespace\n"), "the claims with all blobs would go with it");
    for kind in ["StatefulSet", "Service", "ConfigMap", "Ingress", "ServiceMonitor", "NetworkPolicy"] {
        assert!(deleted.contains(&format!("kind: {kind}\n")), "{kind} would stay");
    }
}

#[test]
fn the_ingress_comes_as_the_cluster_has_it() {
    let world = World::new();
    let (_, calls) = world.ok("enable_ingress.sh", &[]);
    assert!(calls.contains(&"minikube addons enable ingress".to_owned()) && calls.last().unwrap().starts_with("kubectl wait"), "{calls:?}");
    world.context("production");
    let (_, calls) = world.ok("enable_ingress.sh", &["--chart-version", "1.2.3"]);
    assert!(
        calls.iter().any(|call| call.starts_with("helm upgrade --install ingress-nginx") && call.contains("--version 1.2.3")),
        "{calls:?}"
    );
    assert!(!calls.iter().any(|call| call.starts_with("minikube")), "{calls:?}");
    assert_eq!(world.ok("enable_ingress.sh", &["--chart-version", "1.2.3"]).1, calls);
    fs::remove_file(world.path("bin/context")).unwrap();
    let output = world.output("enable_ingress.sh", &[]);
    assert!(!output.status.success() && text(&output).contains("kubectl has no cluster"), "{}", text(&output));
}

#[test]
fn monitoring_is_installed_again_and_again() {
    let world = World::new();
    let (_, first) = world.ok("monitoring.sh", &[]);
    assert!(
        first.iter().any(|call| call.starts_with("helm upgrade --install kube-prometheus-stack") && call.contains("--version ")),
        "{first:?}"
    );
    assert!(first.last().unwrap().starts_with("kubectl apply --server-side"), "{first:?}");
    assert_eq!(world.ok("monitoring.sh", &[]).1, first);
}

#[test]
fn docker_starts_again_and_again_with_one_secret() {
    let world = World::new();
    let (_, first) = world.ok("docker_start.sh", &[]);
    let file = world.path("project/castier-data/compose-peer-secret");
    let secret = fs::read_to_string(&file).unwrap();
    assert_eq!(secret.trim().len(), 64);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644, "the container's user reads it");
    let (_, second) = world.ok("docker_start.sh", &[]);
    assert_eq!((fs::read_to_string(&file).unwrap(), &second), (secret, &first));
    assert!(first[1].starts_with("docker build") && first[2].ends_with("up --detach --wait"), "{first:?}");
    let (_, with_store) = world.ok("docker_start.sh", &["--seaweedfs", "--no-build"]);
    assert!(with_store.last().unwrap().ends_with("compose.seaweedfs.yaml up --detach --wait"), "{with_store:?}");
    let key = fs::read_to_string(world.path("project/castier-data/compose-store-secret")).unwrap();
    let identities = fs::read_to_string(world.path("project/castier-data/compose-store-s3.json")).unwrap();
    let identities: serde_json::Value = serde_json::from_str(&identities).unwrap();
    assert_eq!(identities["identities"][0]["credentials"][0]["secretKey"], key.trim());
    assert!(!world.ok("docker_start.sh", &["--no-build"]).1.iter().any(|call| call.contains("build")));
    assert!(world.ok("docker_start.sh", &["--stop"]).1[0].ends_with(" down"), "the data stays");
    fs::write(world.path("bin/no-daemon"), "").unwrap();
    let output = world.output("docker_start.sh", &[]);
    assert!(!output.status.success() && text(&output).contains("its daemon does not answer"), "{}", text(&output));
}

#[test]
fn forwards_end_with_the_script() {
    let world = World::new();
    for signal in [Signal::INT, Signal::TERM] {
        let _ = fs::remove_file(world.path("bin/forwards"));
        let mut script = Running::start(&mut interruptible(&world.command("port_forward.sh", &["castier", "admin", "grafana"])));
        let forwards = || fs::read_to_string(world.path("bin/forwards")).unwrap_or_default();
        eventually("three forwards", || (forwards().lines().count() == 3).then_some(()));
        assert!(script.log().contains("castier on http://127.0.0.1:8080"), "{}", script.log());
        kill_process(Pid::from_raw(script.id().try_into().unwrap()).unwrap(), signal).unwrap();
        eventually("the script's end", || script.ended().then_some(()));
        for pid in forwards().lines() {
            assert!(!Path::new("/proc").join(pid).exists(), "a forward is left behind");
        }
    }
}

#[test]
fn a_missing_tool_is_one_clear_line() {
    let world = World::new();
    // The scripts' own needs, and none of the big tools.
    let bare = world.path("bare");
    fs::create_dir(&bare).unwrap();
    for name in ["bash", "env", "basename", "dirname", "sed", "git", "cat", "mkdir", "awk", "grep"] {
        symlink(tool(name).unwrap().canonicalize().unwrap(), bare.join(name)).unwrap();
    }
    let missing = [
        ("docker_start.sh", "docker", ""),
        ("docker_start.sh", "minikube", "--minikube"),
        ("enable_ingress.sh", "kubectl", ""),
        ("apply_k8s.sh", "kubectl", ""),
        ("monitoring.sh", "helm", ""),
        ("port_forward.sh", "kubectl", ""),
    ];
    for (script, tool, option) in missing {
        let mut command = world.command(script, &[]);
        command.args((!option.is_empty()).then_some(option)).env("PATH", &bare);
        let output = run(&mut command, b"");
        let told = text(&output);
        assert_eq!(output.status.code(), Some(1), "{script}: {told}");
        let name = script.trim_end_matches(".sh");
        assert!(told.starts_with(&format!("{name}: {tool} is not installed; see ")) && told.lines().count() == 1, "{script}: {told}");
    }
}
