//! castier logs in with a profile of the AWS tools.

use super::{KEY, SECRET, Weed, castier_origin};
use crate::support::{Request, castier_program, command, eventually, noise, run, sha256, turn};
use std::{fs, path::Path};
use tempfile::TempDir;

fn write(dir: &Path, name: &str, text: &str) {
    fs::create_dir_all(dir.join(".aws")).unwrap();
    fs::write(dir.join(".aws").join(name), text).unwrap();
}

fn keys(profile: &str, id: &str) -> String {
    format!("[{profile}]\naws_access_key_id = {id}\naws_secret_access_key = {SECRET}\n")
}

/// Endpoint and keys come from the profile alone. Keys that are replaced are taken when the store refuses the old ones.
#[test]
fn a_profile_is_enough_and_is_read_again() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let home = TempDir::new().unwrap();
    write(home.path(), "config", &format!("[profile team]\nregion = us-east-1\nendpoint_url = {}\n", weed.proxy.url()));
    write(home.path(), "credentials", &keys("team", "nobody"));
    let url = "store.url = \"s3://blobs\"\n";
    // The key of the configuration goes before the keys of the environment.
    let by_key = format!("{url}store.s3.profile = \"team\"\n");
    let (_origin, public, _) = castier_origin(home.path(), &by_key, |command| {
        command.envs([("AWS_ACCESS_KEY_ID", "other"), ("AWS_SECRET_ACCESS_KEY", "other")]);
    });
    let body = noise(800, 100_000);
    let put = Request::new("PUT", &format!("/cas/{}", sha256(&body))).body(body.clone());
    let refused = put.send(public);
    assert!(refused.status == 502 && refused.text().contains("InvalidAccessKeyId"), "{}", refused.text());
    write(home.path(), "credentials", &keys("team", KEY));
    eventually("the new keys are taken", || (put.send(public).status == 201).then_some(()));
    assert_eq!(Request::get(&put.target).send(public).body, body);

    // AWS_PROFILE names it as well. Then the keys of the environment go before it.
    for (id, status) in [(None, 200), (Some("other"), 502)] {
        let (_origin, public, _) = castier_origin(home.path(), url, |command| {
            command.env("AWS_PROFILE", "team");
            if let Some(id) = id {
                command.env("AWS_ACCESS_KEY_ID", id).env("AWS_SECRET_ACCESS_KEY", SECRET);
            }
        });
        let answer = Request::get(&put.target).send(public);
        assert_eq!(answer.status, status, "{}", answer.text());
    }
    // A process gives the keys.
    let json = format!(r#"{{"Version":1,"AccessKeyId":"{KEY}","SecretAccessKey":"{SECRET}"}}"#);
    write(home.path(), "keys.json", &json);
    let process = format!(
        "[default]\nendpoint_url={}\ncredential_process = cat {}\n",
        weed.proxy.url(),
        home.path().join(".aws/keys.json").display()
    );
    write(home.path(), "config", &process);
    let (_origin, public, _) = castier_origin(home.path(), url, |_| {});
    assert_eq!(Request::get(&put.target).send(public).body, body);
}

#[test]
fn a_profile_that_castier_cannot_use_is_named() {
    let _turn = turn();
    let home = TempDir::new().unwrap();
    write(home.path(), "config", "[profile sso]\nsso_session = x\n[profile broken\n");
    let start = |profile: &str| {
        fs::write(home.path().join("origin.toml"), format!("store.url = \"s3://blobs\"\nstore.s3.profile = \"{profile}\"\n")).unwrap();
        run(command(castier_program().with_file_name("castier-origin"), home.path())
            .args(["--config", "origin.toml", "--listen", "127.0.0.1:0"])
            .env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"))
    };
    let broken = start("sso");
    assert!(
        broken.status.code() == Some(1) && broken.stderr.contains("store.s3.profile") && broken.stderr.contains("config: line 3"),
        "{broken}"
    );
    write(home.path(), "config", "[profile sso]\nsso_session = x\n");
    for (profile, says) in [("sso", "single sign-on"), ("none", "there is no profile")] {
        let ran = start(profile);
        assert!(ran.status.code() == Some(1) && ran.stderr.contains("store.s3.profile") && ran.stderr.contains(says), "{ran}");
    }
}
