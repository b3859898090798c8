//! Every overlay is built, validated, and followed from the way in to the port. Its configuration starts castier.

use crate::tools::{Running, bin, node_packages, parse_yaml, read, root, run, skipped, stdout, text, tool};
use castier_config::{Castier, OriginServer, OriginUrl};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpListener,
    path::Path,
    process::Command,
    sync::OnceLock,
};
use tempfile::TempDir;

/// The Kubernetes versions that are promised: the oldest, and the newest that `kubernetes-validate` knows.
const VERSIONS: [&str; 2] = ["1.32", "1.37"];

/// What checkov says and is not followed, and why.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("CKV_K8S_11", "no CPU limit: throttling stops a node for parts of every 100 ms, just when it has most to do"),
    ("CKV_K8S_43", "no digest: it is known only once the image has been built and pushed, so it belongs into a user's overlay"),
    ("CKV_K8S_15", "images are pulled if they are not there: a tag names one build, and a node must come back when the registry is away"),
];

/// Every component at once, beside the overlays of the project: a way in that none of them has, and the autoscaler.
const EVERYTHING: &str = "everything";

/// The overlay whose blobs are in an object store, and which has no castier-origin.
const BUCKET: &str = "seaweedfs";

fn overlay(name: &str) -> Option<Vec<Value>> {
    parse_yaml(build(name)?)
}

/// The YAML of an overlay, built once.
fn build(name: &str) -> Option<&'static str> {
    static BUILT: OnceLock<Option<BTreeMap<String, String>>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let kubectl = tool("kubectl")?;
        let kustomize = |folder: &Path| stdout(Command::new(&kubectl).arg("kustomize").arg(folder), b"");
        let mut built = BTreeMap::new();
        for entry in fs::read_dir(root().join("k8s/overlays")).unwrap() {
            let entry = entry.unwrap();
            built.insert(entry.file_name().into_string().unwrap(), kustomize(&entry.path()));
        }
        let dir = TempDir::new().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        // kustomize takes relative paths alone: up to the root of the file system, and down again.
        let up = "../".repeat(dir.components().count() - 1);
        let k8s = root().join("k8s");
        let at = |path: &str| format!("{up}{}", k8s.join(path).to_str().unwrap().trim_start_matches('/'));
        let components = ["gateway-api", "tls", "peer-tls", "monitoring", "hpa"].map(|name| at(&format!("components/{name}")));
        let kustomization = json!({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "cas", "resources": [at("base")], "components": components,
        });
        fs::write(dir.join("kustomization.yaml"), kustomization.to_string()).unwrap();
        built.insert(EVERYTHING.to_owned(), kustomize(&dir));
        Some(built)
    });
    Some(built.as_ref()?.get(name).unwrap_or_else(|| panic!("there is no overlay {name}")))
}

/// A node uploads what waits in its outbox before its pod ends.
#[test]
fn write_behind_drains_before_a_pod_ends() {
    let Some(kubectl) = tool("kubectl") else { return };
    let dir = TempDir::new().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let up = "../".repeat(dir.components().count() - 1);
    let at = |path: &str| format!("{up}{}", root().join("k8s").join(path).to_str().unwrap().trim_start_matches('/'));
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "cas", "resources": [at("overlays/seaweedfs")],
        "components": [at("components/write-behind")],
    });
    fs::write(dir.join("kustomization.yaml"), kustomization.to_string()).unwrap();
    let yaml = stdout(Command::new(&kubectl).arg("kustomize").arg(&dir), b"");
    if let Some(validate) = tool("kubernetes-validate") {
        let file = dir.join("all.yaml");
        fs::write(&file, &yaml).unwrap();
        for version in VERSIONS {
            let output = run(Command::new(&validate).args(["--strict", "-k", version]).arg(&file), b"");
            assert!(output.status.success(), "Kubernetes {version}: {}", text(&output));
        }
    }
    let Some(objects) = parse_yaml(&yaml) else { return };
    let config = effective::<Castier>(&objects, "castier");
    assert_eq!(config.origin.write, castier_config::Write::Behind);
    let set = named(&objects, "StatefulSet", "castier");
    assert_eq!(
        container(set)["lifecycle"]["preStop"],
        json!({"exec": {"command": ["/usr/bin/castier", "drain", "--timeout", "10m", "--at-least", "10s"]}})
    );
    let grace = pod(set)["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace >= 600 + config.shutdown.grace.get().as_secs() + 12, "{grace}");
    let admin = config.listen.admin.rsplit_once(':').unwrap();
    assert_eq!(admin, ("0.0.0.0", "8082"), "`castier drain` asks 127.0.0.1:8082");
}

/// The overlays by name; none if there is nothing to build them with.
fn overlays() -> Vec<&'static str> {
    let names = ["minikube", "production", BUCKET, EVERYTHING];
    let folders = fs::read_dir(root().join("k8s/overlays")).unwrap().count();
    assert_eq!(folders + 1, names.len(), "name the new overlay here");
    if build("minikube").is_none() { Vec::new() } else { names.to_vec() }
}

fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.next().unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn pod(set: &Value) -> &Value {
    &set["spec"]["template"]["spec"]
}

fn container(set: &Value) -> &Value {
    assert_eq!(items(&pod(set)["containers"]).len(), 1);
    &pod(set)["containers"][0]
}

/// `selector` selects what has these labels.
fn selects(selector: &Value, labels: &Value) -> bool {
    selector.as_object().unwrap().iter().all(|(key, value)| labels[key] == *value)
}

// ---- valid ----

#[test]
fn every_overlay_is_valid() {
    for name in overlays() {
        let yaml = build(name).unwrap();
        if let Some(validate) = tool("kubernetes-validate") {
            let dir = TempDir::new().unwrap();
            let file = dir.path().join("all.yaml");
            fs::write(&file, yaml).unwrap();
            for version in VERSIONS {
                let output = run(Command::new(&validate).args(["--strict", "-k", version]).arg(&file), b"");
                assert!(output.status.success(), "{name}, Kubernetes {version}: {}", text(&output));
                // It passes what it does not know: that must be custom resources, and no slip of the pen in an apiVersion.
                let unknown = text(&output).matches("Couldn't find schema").count();
                assert_eq!(
                    unknown,
                    yaml.matches("apiVersion: gateway.networking").count() + yaml.matches("apiVersion: monitoring.coreos").count()
                );
            }
        }
        if let (Some(node), Some(packages), Some(objects)) = (tool("node"), node_packages(), parse_yaml(yaml)) {
            let script = root().join("proxy/tests/deploy/crds.mjs");
            let told = run(Command::new(&node).arg(&script).arg(&packages), &serde_json::to_vec(&objects).unwrap());
            assert!(told.status.success(), "{name}: {}", text(&told));
            let foreign = objects.iter().filter(|object| {
                let group = object["apiVersion"].as_str().unwrap();
                group.starts_with("gateway.networking") || group.starts_with("monitoring.coreos")
            });
            assert_eq!(text(&told).matches("is valid").count(), foreign.count(), "{name}: {}", text(&told));
            // The check itself sees what it should.
            let wrong = json!([{
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "x"}, "spec": {"parentRef": []},
            }]);
            let told = run(Command::new(&node).arg(&script).arg(&packages), wrong.to_string().as_bytes());
            assert!(text(&told).contains("parentRef is no known field"), "{}", text(&told));
        }
    }
}

#[test]
fn checkov_finds_nothing_but_the_exceptions() {
    let Some(checkov) = tool("checkov") else { return };
    // checkov does not look into hidden directories.
    let dir = TempDir::with_prefix("castier-").unwrap();
    for name in overlays() {
        fs::write(dir.path().join(format!("{name}.yaml")), build(name).unwrap()).unwrap();
    }
    if overlays().is_empty() {
        return;
    }
    let options = ["--framework", "kubernetes", "--skip-download", "--compact", "--output", "json", "--directory"];
    let output = run(Command::new(checkov).args(options).arg(dir.path()), b"");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)));
    assert_eq!(told["summary"]["parsing_errors"], 0);
    assert!(told["summary"]["passed"].as_u64().unwrap() > 100, "{}", told["summary"]);
    let mut seen = BTreeSet::new();
    for check in items(&told["results"]["failed_checks"]) {
        let id = check["check_id"].as_str().unwrap();
        assert!(
            EXCEPTIONS.iter().any(|(known, _)| *known == id),
            "{id}: {} of {} in {}; repair it, or add an exception with its reason",
            check["check_name"],
            check["resource"],
            check["file_path"]
        );
        seen.insert(id);
    }
    for (id, _) in EXCEPTIONS {
        assert!(seen.contains(id), "checkov no longer says {id}; remove the exception");
    }
}

// ---- the way in ----

/// The ports that a Service's port leads to, after checking that the pods behind it are there and have that port.
fn follow_service(objects: &[Value], service: &Value, port: &Value) -> u64 {
    let ports = items(&service["spec"]["ports"]);
    let port = ports.iter().find(|known| known["name"] == *port || known["port"] == *port).expect("the Service has that port");
    let selector = &service["spec"]["selector"];
    let sets: Vec<_> =
        of_kind(objects, "StatefulSet").filter(|set| selects(selector, &set["spec"]["template"]["metadata"]["labels"])).collect();
    assert_eq!(sets.len(), 1, "{selector} selects the pods of one StatefulSet");
    let target = &port["targetPort"];
    let open = items(&container(sets[0])["ports"]).iter().find(|open| open["name"] == *target || open["containerPort"] == *target);
    open.expect("the container has that port")["containerPort"].as_u64().unwrap()
}

#[test]
fn every_way_in_leads_to_castiers_port() {
    for name in overlays() {
        let Some(objects) = overlay(name) else { return };
        let mut ways = 0;
        for ingress in of_kind(&objects, "Ingress") {
            assert_eq!(ingress["spec"]["ingressClassName"], "nginx");
            for rule in items(&ingress["spec"]["rules"]) {
                for path in items(&rule["http"]["paths"]) {
                    assert_eq!((&path["path"], &path["pathType"]), (&json!("/"), &json!("Prefix")), "{name}: everything goes to castier");
                    let backend = &path["backend"]["service"];
                    let service = named(&objects, "Service", backend["name"].as_str().unwrap());
                    assert_eq!(follow_service(&objects, service, &backend["port"]["name"]), 8080, "{name}");
                    ways += 1;
                }
                if let Some(hosts) = ingress["spec"]["tls"][0]["hosts"].as_array() {
                    assert!(hosts.contains(&rule["host"]), "{name}: the certificate is for the host");
                }
            }
            let annotation = |key: &str| &ingress["metadata"]["annotations"][format!("nginx.ingress.kubernetes.io/{key}")];
            for (key, value) in [("proxy-body-size", "0"), ("proxy-request-buffering", "off"), ("proxy-buffering", "off")] {
                assert_eq!(annotation(key), value, "{name}: streams without a limit");
            }
            assert!(annotation("upstream-hash-by").is_null(), "hashing by URI is an option of the user's");
        }
        for route in of_kind(&objects, "HTTPRoute") {
            let gateway = named(&objects, "Gateway", route["spec"]["parentRefs"][0]["name"].as_str().unwrap());
            assert!(!items(&gateway["spec"]["listeners"]).is_empty());
            for rule in items(&route["spec"]["rules"]) {
                assert_eq!(rule["timeouts"]["request"], "0s", "{name}: a large blob takes as long as it takes");
                let backend = &rule["backendRefs"][0];
                let service = named(&objects, "Service", backend["name"].as_str().unwrap());
                assert_eq!(follow_service(&objects, service, &backend["port"]), 8080, "{name}");
                ways += 1;
            }
        }
        assert_eq!(ways, 1, "{name} has one way in");
        // The rest of the Services: the nodes among each other, the origin, metrics.
        let store: &[_] = match name {
            BUCKET => &[("seaweedfs", "s3", 8333)],
            _ => &[("castier-origin", "http", 9000), ("castier-origin", "admin", 9001)],
        };
        for &(service, port, leads_to) in [("castier-peers", "peer", 8081), ("castier-peers", "admin", 8082)].iter().chain(store) {
            assert_eq!(follow_service(&objects, named(&objects, "Service", service), &json!(port)), leads_to, "{name}");
        }
        for monitor in of_kind(&objects, "ServiceMonitor") {
            let selector = &monitor["spec"]["selector"]["matchLabels"];
            let services: Vec<_> =
                of_kind(&objects, "Service").filter(|service| selects(selector, &service["metadata"]["labels"])).collect();
            assert_eq!(services.len(), 1, "{name}: {selector} selects one Service");
            let port = follow_service(&objects, services[0], &monitor["spec"]["endpoints"][0]["port"]);
            assert!([8082, 9001].contains(&port), "{name}: metrics come from an admin listener");
            let job = &services[0]["metadata"]["labels"]["app.kubernetes.io/name"];
            assert_eq!(*job, monitor["metadata"]["name"], "the job's name");
        }
    }
}

// ---- what an operator relies on ----

/// The effective configuration of a StatefulSet's only container, by castier's own reader: the ConfigMap's file and the variables.
fn effective<C: castier_config::Config>(objects: &[Value], set: &str) -> C {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let file = path("config.toml");
    fs::write(&file, config_text(objects, set)).unwrap();
    let mut variables = variables(named(objects, "StatefulSet", set));
    // The reader looks at files and directories that only the pod has.
    for (_, value) in variables.iter_mut().filter(|(key, _)| key.contains("__TLS__")) {
        value.clear();
    }
    if set == "castier" {
        fs::write(path("secret"), "0123456789abcdef0123456789abcdef\n").unwrap();
        for (_, value) in variables.iter_mut().filter(|(key, _)| key.ends_with("__SECRET_ACCESS_KEY_FILE")) {
            *value = path("secret");
        }
        variables.push(("CASTIER_CLUSTER__SECRET_FILE".to_owned(), path("secret")));
        variables.push(("CASTIER_FILL__SPOOL_DIR".to_owned(), path("")));
    }
    let loaded = castier_config::load::<C>(Some(file.as_ref()), variables.into_iter());
    loaded.unwrap_or_else(|problems| panic!("{set}: {problems}")).config
}

/// The text of a key that stands in a file of its own line, such as a path that only the pod has.
fn literal<'a>(toml: &'a str, key: &str) -> &'a str {
    let line =
        toml.lines().find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix("= \"")).unwrap_or_else(|| panic!("no {key}"));
    line.split('"').next().unwrap()
}

/// The file that the container is started with.
fn config_text(objects: &[Value], set: &str) -> String {
    let set = named(objects, "StatefulSet", set);
    let args = items(&container(set)["args"]);
    assert_eq!(args[0], "--config");
    let (folder, file) = args[1].as_str().unwrap().rsplit_once('/').unwrap();
    let mount = items(&container(set)["volumeMounts"]).iter().find(|mount| mount["mountPath"] == folder).expect("its folder is mounted");
    let volume = items(&pod(set)["volumes"]).iter().find(|volume| volume["name"] == mount["name"]).expect("the volume is there");
    let map = named(objects, "ConfigMap", volume["configMap"]["name"].as_str().unwrap());
    map["data"][file].as_str().expect("the file is in the ConfigMap").to_owned()
}

/// The variables that the pod castier-1 has.
fn variables(set: &Value) -> Vec<(String, String)> {
    let env = items(&container(set)["env"]);
    let value = |variable: &Value| match variable["value"].as_str() {
        Some(value) => value.replace("$(POD_NAME)", "castier-1"),
        None => {
            assert_eq!(variable["valueFrom"]["fieldRef"]["fieldPath"], "metadata.name");
            "castier-1".to_owned()
        }
    };
    env.iter().map(|variable| (variable["name"].as_str().unwrap().to_owned(), value(variable))).collect()
}

/// A quantity of Kubernetes, in bytes.
fn quantity(value: &Value) -> u64 {
    let text = value.as_str().unwrap();
    let (number, shift) =
        text.strip_suffix("Gi").map(|number| (number, 30)).or(text.strip_suffix("Mi").map(|number| (number, 20))).unwrap();
    number.parse::<u64>().unwrap() << shift
}

const MIB: u64 = 1 << 20;

#[test]
fn a_nodes_identity_outlives_its_pod() {
    for name in overlays() {
        let Some(objects) = overlay(name) else { return };
        let set = named(&objects, "StatefulSet", "castier");
        let config = effective::<Castier>(&objects, "castier");
        let cluster = config.cluster.expect("a cluster");
        let service = named(&objects, "Service", set["spec"]["serviceName"].as_str().unwrap());
        assert_eq!(service["spec"]["clusterIP"], "None");
        assert_eq!(service["spec"]["publishNotReadyAddresses"], true, "a node that starts or ends still has peers");
        let domain = format!(
            "{}.{}.svc.cluster.local",
            service["metadata"]["name"].as_str().unwrap(),
            set["metadata"]["namespace"].as_str().unwrap()
        );
        // The name that the SRV record of the port has for this pod.
        assert_eq!(cluster.dns, format!("_peer._tcp.{domain}"));
        let port = items(&service["spec"]["ports"]).iter().find(|port| port["name"] == "peer").unwrap()["port"].as_u64().unwrap();
        assert_eq!(cluster.advertise, format!("castier-1.{domain}:{port}"));
        assert!(config.listen.peer.to_string().ends_with(&format!(":{port}")));
        // The disk that goes with the name.
        let disk = config.disk.expect("a disk tier");
        let mount = items(&container(set)["volumeMounts"]).iter().find(|mount| disk.path.starts_with(mount["mountPath"].as_str().unwrap()));
        let claims = items(&set["spec"]["volumeClaimTemplates"]);
        assert_eq!(claims[0]["metadata"]["name"], mount.expect("disk.path is on a volume")["name"]);
        let text = config_text(&objects, "castier");
        // Not a directory below it, as nobody would make that.
        assert_eq!(literal(&text, "spool_dir"), mount.unwrap()["mountPath"], "the spool is on the claim");
        let secret = Path::new(literal(&text, "secret_file"));
        let mounts = items(&container(set)["volumeMounts"]);
        let mount =
            mounts.iter().find(|mount| secret.parent().unwrap().to_str() == mount["mountPath"].as_str()).expect("the secret is mounted");
        let volume = items(&pod(set)["volumes"]).iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        assert_eq!(volume["secret"]["secretName"], "castier-peer");
        // The key that scripts/apply_k8s.sh makes.
        assert!(read("scripts/apply_k8s.sh").contains(&format!("--from-file={}=", secret.file_name().unwrap().to_str().unwrap())));
        assert_eq!(set["spec"]["podManagementPolicy"], "Parallel");
    }
}

#[test]
fn memory_disk_and_grace_fit_the_configuration() {
    for name in overlays() {
        let Some(objects) = overlay(name) else { return };
        let set = named(&objects, "StatefulSet", "castier");
        let config = effective::<Castier>(&objects, "castier");
        let disk = config.disk.as_ref().unwrap();
        // docs/kubernetes.md, "Memory"; blobs of 64 KiB on average.
        let index = disk.capacity.get() / (64 * 1024) * 264;
        let plan = castier::memory_plan::memory(&config, &config.limits) + index;
        let resources = &container(set)["resources"];
        let limit = quantity(&resources["limits"]["memory"]);
        assert_eq!(quantity(&resources["requests"]["memory"]), limit, "{name}");
        assert!(limit as f64 >= 1.15 * plan as f64, "{name}: the plan is {} MiB, the limit {} MiB", plan / MIB, limit / MIB);
        assert!(limit < 2 * plan, "{name}: the plan is {} MiB, the limit {} MiB", plan / MIB, limit / MIB);

        let claim = quantity(&set["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]);
        let needed = (disk.capacity.get() + disk.quarantine.get() + config.fill.spool.get()) as f64 * 1.05;
        assert!(claim as f64 >= needed, "{name}: {} MiB are needed, the claim has {}", needed as u64 / MIB, claim / MIB);

        let origin = (name != BUCKET).then(|| ("castier-origin", effective::<OriginServer>(&objects, "castier-origin").shutdown.grace));
        for (set, grace) in [("castier", config.shutdown.grace)].into_iter().chain(origin) {
            let set = named(&objects, "StatefulSet", set);
            let sleep = container(set)["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
            let kill = pod(set)["terminationGracePeriodSeconds"].as_u64().unwrap();
            // Two more seconds for the peers, ten for what waits for the disk.
            let needed = sleep + grace.get().as_secs() + if set["metadata"]["name"] == "castier" { 12 } else { 5 };
            assert!(sleep >= 5 && kill >= needed, "{name}: {needed} s are needed, and {kill} s given");
        }
    }
}

#[test]
fn pods_may_do_no_more_than_they_need() {
    for name in overlays() {
        let Some(objects) = overlay(name) else { return };
        assert_eq!(of_kind(&objects, "Secret").count(), 0, "{name}: secrets are made by hand");
        assert!(objects.iter().all(|object| object["kind"] == "Namespace" || object["metadata"]["namespace"] == "cas"), "{name}");
        for set in of_kind(&objects, "StatefulSet") {
            let (pod, container) = (pod(set), container(set));
            let of_pod = &pod["securityContext"];
            assert_eq!((&of_pod["runAsNonRoot"], &of_pod["runAsUser"]), (&json!(true), &json!(65532)));
            assert_eq!(of_pod["seccompProfile"]["type"], "RuntimeDefault");
            assert_eq!(pod["automountServiceAccountToken"], false);
            let of_container = &container["securityContext"];
            assert_eq!(of_container["readOnlyRootFilesystem"], true);
            assert_eq!(of_container["allowPrivilegeEscalation"], false);
            assert_eq!(of_container["capabilities"], json!({"drop": ["ALL"]}));
            assert!(container["resources"]["limits"]["cpu"].is_null());
            let (port, ready) = if set["metadata"]["name"] == "seaweedfs" { ("s3", "/healthz") } else { ("admin", "/readyz") };
            for (probe, path) in [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", ready)] {
                assert_eq!(container[probe]["httpGet"], json!({"path": path, "port": port}), "{name}: {probe}");
            }
        }
        let budget = named(&objects, "PodDisruptionBudget", "castier");
        assert_eq!(budget["spec"]["maxUnavailable"], 1);
        let set = named(&objects, "StatefulSet", "castier");
        let labels = &set["spec"]["template"]["metadata"]["labels"];
        assert!(selects(&budget["spec"]["selector"]["matchLabels"], labels));
        assert!(!items(&pod(set)["topologySpreadConstraints"]).is_empty());

        // The autoscaler and a fixed number would undo each other's work.
        let scalers: Vec<_> = of_kind(&objects, "HorizontalPodAutoscaler").collect();
        assert_eq!(scalers.len(), usize::from(name == EVERYTHING), "{name}");
        assert_eq!(set["spec"]["replicas"].is_null(), name == EVERYTHING, "{name}");
        for scaler in scalers {
            let behavior = &scaler["spec"]["behavior"];
            assert_eq!(behavior["scaleDown"]["stabilizationWindowSeconds"], 1800);
            for direction in ["scaleUp", "scaleDown"] {
                let policies = items(&behavior[direction]["policies"]);
                assert!(policies.len() == 1 && policies[0]["type"] == "Pods" && policies[0]["value"] == 1, "one pod at a time");
            }
        }
    }
}

/// Whether the NetworkPolicies let a pod with these labels, in that namespace, connect to that port of a pod of the StatefulSet.
fn may_connect(objects: &[Value], from: (&str, &str), set: &str, port: u64) -> bool {
    let labels = |name: &str| json!({"app.kubernetes.io/name": name});
    let policies = |of: &str| {
        let labels = labels(of);
        of_kind(objects, "NetworkPolicy").filter(move |policy| {
            let selector = &policy["spec"]["podSelector"]["matchLabels"];
            selector.is_null() || selects(selector, &labels)
        })
    };
    let fits = |rule: &Value, peers: &str, namespace: &str, pod: &str| {
        let port = items(&rule["ports"]).iter().any(|known| known["port"] == port);
        let peer = rule[peers].is_null()
            || items(&rule[peers]).iter().any(|peer| match &peer["namespaceSelector"]["matchLabels"] {
                Value::Null => namespace == "cas" && selects(&peer["podSelector"]["matchLabels"], &labels(pod)),
                selector => selects(selector, &json!({"kubernetes.io/metadata.name": namespace})),
            });
        port && peer
    };
    let admitted = policies(set).any(|policy| items(&policy["spec"]["ingress"]).iter().any(|rule| fits(rule, "from", from.0, from.1)));
    // Other namespaces are none of ours.
    let let_out =
        from.0 != "cas" || policies(from.1).any(|policy| items(&policy["spec"]["egress"]).iter().any(|rule| fits(rule, "to", "cas", set)));
    admitted && let_out
}

#[test]
fn network_policies_admit_whom_they_should() {
    for name in overlays() {
        let Some(objects) = overlay(name) else { return };
        let deny = named(&objects, "NetworkPolicy", "deny-all");
        assert_eq!(deny["spec"], json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
        let may = |from, set, port| may_connect(&objects, from, set, port);
        let (castier, ingress, prometheus, stranger) =
            (("cas", "castier"), ("ingress-nginx", "x"), ("monitoring", "x"), ("elsewhere", "x"));
        assert!(may(ingress, "castier", 8080) && may(stranger, "castier", 8080), "clients");
        let (store, port) = if name == BUCKET { ("seaweedfs", 8333) } else { ("castier-origin", 9000) };
        assert!(may(castier, "castier", 8081) && may(castier, store, port), "{name}: nodes");
        assert!(may(prometheus, "castier", 8082) && (name == BUCKET || may(prometheus, "castier-origin", 9001)), "Prometheus");
        for from in [ingress, prometheus, stranger, ("cas", store)] {
            assert!(!may(from, "castier", 8081), "{name}: only nodes reach the peer port, not {from:?}");
            assert!(!may(from, store, port), "{name}: only nodes reach the store, not {from:?}");
        }
        for from in [castier, ingress, stranger, ("cas", store)] {
            assert!(
                !may(from, "castier", 8082) && !may(from, "castier-origin", 9001),
                "{name}: only Prometheus reaches the admin listener, not {from:?}"
            );
        }
    }
}

/// The store and castier agree on the key, the Secret has the files that both read, and no castier-origin is left.
#[test]
fn an_object_store_is_in_place_of_castier_origin() {
    let Some(objects) = overlay(BUCKET) else { return };
    let names: Vec<_> = objects.iter().filter_map(|object| object["metadata"]["name"].as_str()).collect();
    assert!(!names.iter().any(|name| *name == "castier-origin" || name.starts_with("castier-origin-")), "{names:?}");
    let config = effective::<Castier>(&objects, "castier");
    assert!(matches!(&config.origin.url, OriginUrl::Bucket(bucket) if bucket.name == "blobs"), "{:?}", config.origin.url);
    let service = named(&objects, "Service", "seaweedfs");
    let port = service["spec"]["ports"][0]["port"].as_u64().unwrap();
    assert_eq!(config.origin.s3.endpoint, format!("http://seaweedfs.cas.svc.cluster.local:{port}"));
    let store = named(&objects, "StatefulSet", "seaweedfs");
    let args: Vec<_> = items(&container(store)["args"]).iter().map(|arg| arg.as_str().unwrap()).collect();
    let s3_config = args.iter().find_map(|arg| arg.strip_prefix("-s3.config=")).unwrap();
    assert!(args.contains(&"-ip.bind=127.0.0.1") && args.contains(&"-s3.ip.bind=0.0.0.0"), "only S3 is open: {args:?}");
    let secret = variables(named(&objects, "StatefulSet", "castier")).into_iter().find(|(key, _)| key.ends_with("SECRET_ACCESS_KEY_FILE"));
    for (set, file) in [("seaweedfs", s3_config), ("castier", secret.unwrap().1.as_str())] {
        let set = named(&objects, "StatefulSet", set);
        let (folder, file) = file.rsplit_once('/').unwrap();
        let mount =
            items(&container(set)["volumeMounts"]).iter().find(|mount| mount["mountPath"] == folder).expect("the secret is mounted");
        let volume = items(&pod(set)["volumes"]).iter().find(|volume| volume["name"] == mount["name"]).unwrap();
        assert_eq!(volume["secret"]["secretName"], "castier-store");
        assert_eq!(volume["secret"]["items"], json!([{"key": file, "path": file}]), "each pod has its own part of the Secret alone");
        // What makes the Secret.
        for text in [read("docs/kubernetes.md"), read("scripts/apply_k8s.sh")] {
            assert!(text.contains(&format!("--from-file={file}=")), "{file}");
        }
    }
}

#[test]
fn the_prometheus_rule_is_made_of_the_rule_files() {
    let made = stdout(Command::new(root().join("scripts/monitoring.sh")).args(["--write-rule", "--dry-run"]), b"");
    assert_eq!(made, read("k8s/components/monitoring/prometheusrule.yaml"), "run scripts/monitoring.sh --write-rule");
    // kustomize has read it; and it has as many alerts as the files.
    let alerts = |text: &str| text.matches("- alert: ").count();
    let files = fs::read_dir(root().join("grafana/prometheus")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files.filter(|path| path.to_str().unwrap().ends_with(".rules.yaml")).collect();
    assert_eq!(alerts(&made), files.iter().map(|file| alerts(&fs::read_to_string(file).unwrap())).sum::<usize>());
    if let Some(promtool) = tool("promtool") {
        stdout(Command::new(promtool).args(["check", "rules"]).args(&files), b"");
    }
}

// ---- the configuration starts castier ----

/// SeaweedFS as its container is started, with what only a pod has replaced. It, and the URL of its S3 listener.
fn seaweedfs(objects: &[Value], dir: &Path) -> Option<(Running, String)> {
    let weed = tool("weed")?;
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("data")).unwrap();
    fs::write(path("store-secret"), "0123456789abcdef").unwrap();
    // As scripts/apply_k8s.sh makes it.
    let script = read("scripts/apply_k8s.sh");
    let identities = script.lines().find_map(|line| line.trim().strip_prefix("identities='")?.strip_suffix('\'')).unwrap();
    fs::write(path("s3.json"), identities.replace("%s", "0123456789abcdef")).unwrap();
    let container = container(named(objects, "StatefulSet", "seaweedfs"));
    let args = items(&container["args"]).iter().map(|arg| arg.as_str().unwrap());
    let args = args.map(|arg| match arg.split_once('=').unwrap_or((arg, "")).0 {
        "-dir" => format!("-dir={}", path("data")),
        "-s3.config" => format!("-s3.config={}", path("s3.json")),
        "-s3.ip.bind" => "-s3.ip.bind=127.0.0.1".to_owned(),
        _ => arg.to_owned(),
    });
    let listeners: Vec<_> = (0..8).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    drop(listeners);
    let own = ["s3", "master", "volume", "filer"].into_iter().enumerate();
    let own =
        own.flat_map(|(at, of)| [format!("-{of}.port={}", ports[2 * at].port()), format!("-{of}.port.grpc={}", ports[2 * at + 1].port())]);
    let mut store = Running::start(Command::new(weed).current_dir(dir).args(args.chain(own)));
    store.wait_for(ports[0]);
    Some((store, format!("http://{}", ports[0])))
}

#[test]
fn the_config_maps_start_both_programs() {
    for name in overlays() {
        let Some(objects) = overlay(name) else { return };
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let start = |set: &str, mut variables: BTreeMap<String, String>, here: &[(&str, &str)]| {
            fs::write(path(set), config_text(&objects, set)).unwrap();
            // What only a pod has: its addresses and volumes.
            variables.extend(here.iter().map(|(key, value)| (format!("CASTIER_{key}"), (*value).to_owned())));
            let program =
                container(named(&objects, "StatefulSet", set))["command"][0].as_str().unwrap_or("castier").rsplit('/').next().unwrap();
            Running::start(Command::new(bin().join(program)).arg("--config").arg(path(set)).envs(variables))
        };
        let own =
            |set: &str| variables(named(&objects, "StatefulSet", set)).into_iter().filter(|(key, _)| !key.contains("__TLS__")).collect();
        let (public, admin) = (("LISTEN__PUBLIC", "127.0.0.1:0"), ("LISTEN__ADMIN", "127.0.0.1:0"));
        let (_store, url, endpoint) = if name == BUCKET {
            let Some((store, endpoint)) = seaweedfs(&objects, dir.path()) else { continue };
            (store, "s3://blobs".to_owned(), endpoint)
        } else {
            let mut origin = start("castier-origin", own("castier-origin"), &[public, admin, ("STORE__ROOT", &path("store"))]);
            let url = format!("http://{}", origin.address("listening public "));
            (origin, url, String::new())
        };
        fs::write(path("secret"), "0123456789abcdef0123456789abcdef\n").unwrap();
        fs::create_dir(path("claim")).unwrap();
        let here = [
            public,
            admin,
            ("LISTEN__PEER", "127.0.0.1:0"),
            ("ORIGIN__URL", &url),
            ("DISK__PATH", &path("claim/cache")),
            ("FILL__SPOOL_DIR", &path("claim")),
            ("CLUSTER__SECRET_FILE", &path("secret")),
        ];
        let store_secret = path("store-secret");
        let s3 = [("ORIGIN__S3__ENDPOINT", &*endpoint), ("ORIGIN__S3__SECRET_ACCESS_KEY_FILE", &*store_secret)];
        let here: Vec<_> = here.iter().copied().chain(s3.into_iter().filter(|_| name == BUCKET)).collect();
        let mut castier = start("castier", own("castier"), &here);
        let address = castier.address("listening public ");
        castier.wait_for(address);
        let Some(curl) = tool("curl") else { return };
        let body = "a blob by way of the ConfigMap's configuration";
        // A store that has just started has no bucket yet, or fails until it has made its first volume: 502.
        let post = format!("http://{address}/cas");
        let post = ["--retry", "60", "--retry-delay", "1", "--silent", "--show-error", "--fail", "--data-binary", body, &post];
        let stored: Value = serde_json::from_str(&stdout(Command::new(&curl).args(post), b"")).unwrap();
        let url = format!("http://{address}/cas/{}", stored["digest"].as_str().unwrap());
        assert_eq!(stdout(Command::new(&curl).args(["--silent", "--show-error", "--fail", &url]), b""), body, "{name}");
    }
    if overlays().is_empty() {
        skipped("nothing builds the overlays");
    }
}
