//! Configurations, good and bad, through `check` and `serve`.

use super::{TempDir, halfway, ice, instance, run};

#[track_caller]
fn refused(command: &str, args: &[&str], file: &str, expected: &[&str]) {
    let dir = TempDir::new();
    dir.write("h.toml", file);
    let args = [&[command, "--config", "h.toml"], args].concat();
    let (code, stdout, stderr) = run(&mut halfway(&dir, &args));
    assert_eq!((code, stdout.as_str()), (78, ""), "{file}: {stderr}");
    assert_eq!(stderr.lines().collect::<Vec<_>>(), expected, "{file}");
    assert_eq!(dir.names(), ["h.toml"], "nothing is made by a configuration that is refused");
}

#[test]
fn each_mistake_has_its_file_line_and_key() {
    for (file, expected) in [
        (
            "[http]\nlisten = ['8443']",
            r#"h.toml:2: http.listen: "8443" is not an address and a port, such as "[::]:8443" or "192.0.2.1:443""#,
        ),
        ("[http]\n\nport = 443", "h.toml:3: http.port: unknown key"),
        (
            "[turn]\nallow_peers = [\n  '10.0.0.0/8',\n  '10.0.0.0/99',\n]",
            r#"h.toml:4: turn.allow_peers: "10.0.0.0/99" is not a CIDR, such as "10.0.0.0/8" or "fd00::/8""#,
        ),
        (
            "[credentials]\nsecrets = ['secret']",
            "h.toml:2: credentials.secrets: a secret of 6 bytes is too weak: 16 bytes at least",
        ),
        (
            "auth.secrets = ['only sixteen byte']",
            "h.toml:1: auth.secrets: a secret of 17 bytes is too weak: 32 bytes at least",
        ),
        (
            "[turn]\nrelay_ports = '65535-49152'",
            r#"h.toml:2: turn.relay_ports: "65535-49152" is the wrong way round: the lower port comes first"#,
        ),
        ("[credentials]\nttl = '48h'", "h.toml:2: credentials.ttl: is longer than credentials.max_ttl"),
        ("[http]\ncert = 'c.pem'", "h.toml:2: http.cert: is given without http.key"),
        (
            "[http.acme]\ndomains = ['*.a.org']",
            r#"h.toml:2: http.acme.domains: "*.a.org" is a wildcard, for which authorities want a DNS record: name each host"#,
        ),
        (
            "[log]\nfilter = 'halfway=loud'",
            r#"h.toml:2: log.filter: "halfway=loud" is not a log filter, such as "info" or "info,halfway=debug""#,
        ),
    ] {
        refused("check", &[], file, &[expected]);
        refused("serve", &[], file, &[expected]);
    }
}

#[test]
fn all_mistakes_are_said_at_once() {
    refused(
        "check",
        &["--public-ip", "nowhere", "--drain-timeout", "30"],
        "[turn]\nxdp = 'on'\nrealm = ''\n[log]\nformat = 'xml'\n",
        &[
            r#"--public-ip: "nowhere" is not an IP address"#,
            r#"--drain-timeout: "30" is not a length of time, such as "90s", "1h" or "30d""#,
            r#"h.toml:2: turn.xdp: "on" is none of "auto", "driver", "generic" and "off""#,
            "h.toml:3: turn.realm: must be 1 to 127 bytes, without quotes or backslashes",
            r#"h.toml:5: log.format: "xml" is neither "text" nor "json""#,
        ],
    );
}

#[test]
fn token_and_ice_refuse_a_bad_configuration_too() {
    let dir = instance();
    dir.write("h.toml", "new = 1");
    for args in [&["token", "a", "--config", "h.toml"][..], &["ice", "--config", "h.toml"]] {
        assert_eq!(
            run(&mut halfway(&dir, args)),
            (78, String::new(), "h.toml:1: new: unknown key\n".to_owned())
        );
    }
}

#[test]
fn a_file_that_is_named_must_be_there() {
    let dir = TempDir::new();
    let (code, _, stderr) = run(&mut halfway(&dir, &["check", "--config", "no.toml", "--relay-ports", "1"]));
    assert_eq!(code, 78);
    let lines: Vec<_> = stderr.lines().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(lines, ["no.toml", "--relay-ports"], "{stderr}");
}

#[test]
fn a_certificate_is_read_before_the_start() {
    let dir = TempDir::new();
    dir.write("key.pem", "nothing");
    let file = "[http]\ncert = 'cert.pem'\nkey = 'key.pem'";
    dir.write("h.toml", file);
    let (code, _, stderr) = run(&mut halfway(&dir, &["check", "--config", "h.toml"]));
    assert_eq!(code, 78);
    assert!(stderr.starts_with("h.toml:2: http.cert: cert.pem cannot be read"), "{stderr}");
    dir.write("cert.pem", "nothing");
    let (_, _, stderr) = run(&mut halfway(&dir, &["check", "--config", "h.toml"]));
    assert_eq!(stderr, "h.toml:2: http.cert: no CERTIFICATE block in PEM\n");
}

#[test]
fn a_good_configuration_has_no_problems() {
    let dir = TempDir::new();
    dir.write("h.toml", "public_host = 'turn.example.org'");
    let good = (0, "h.toml: no problems\n".to_owned(), String::new());
    assert_eq!(run(&mut halfway(&dir, &["check", "--config", "h.toml"])), good);
    assert_eq!(run(halfway(&dir, &["check"]).env("HALFWAY_CONFIG", "h.toml")), good);
    assert_eq!(dir.names(), ["h.toml"]);
}

/// Every line of the example that is a setting must be one, at its default or commented out.
#[test]
fn the_example_configuration_has_no_problems() {
    let example = include_str!("../../../systemd/halfway.toml");
    let dir = TempDir::new();
    dir.write("as-it-is.toml", example);
    let (code, _, stderr) = run(&mut halfway(&dir, &["check", "--config", "as-it-is.toml"]));
    assert_eq!((code, stderr.as_str()), (0, ""));
    let is_setting = |line: &&str| {
        line.starts_with('[')
            || line.starts_with('#') && line[1..].starts_with(|c: char| c.is_ascii_lowercase())
    };
    let uncommented: String = example
        .lines()
        .filter(is_setting)
        .map(|line| format!("{}\n", line.trim_start_matches('#')))
        .collect();
    assert!(uncommented.contains("\nrelay_ports ="), "{uncommented}");
    dir.write("uncommented.toml", &uncommented);
    let (code, _, stderr) = run(&mut halfway(&dir, &["check", "--config", "uncommented.toml"]));
    assert_eq!((code, stderr.as_str()), (0, ""), "{uncommented}");
}

#[test]
fn flag_over_environment_over_file_over_default() {
    let dir = instance();
    let host = |args: &[&str], env: Option<&str>| {
        let args = [&["ice", "--public-ip", "192.0.2.1"], args].concat();
        let mut command = halfway(&dir, &args);
        command.envs(env.map(|host| ("HALFWAY_PUBLIC_HOST", host)));
        let url = ice(&mut command)["uris"][0].as_str().unwrap().to_owned();
        url.split(':').nth(1).unwrap().to_owned()
    };
    dir.write("h.toml", "public_host = 'of.file'");
    let file = ["--config", "h.toml"];
    assert_eq!(host(&[], None), "192.0.2.1");
    assert_eq!(host(&file, None), "of.file");
    assert_eq!(host(&file, Some("of.environment")), "of.environment");
    assert_eq!(host(&file, Some("")), "of.file", "an empty variable says nothing");
    let both = [&file[..], &["--public-host", "of.flag"]].concat();
    assert_eq!(host(&both, Some("of.environment")), "of.flag");
}

#[test]
fn the_data_dir_follows_the_same_order() {
    let dir = TempDir::new();
    dir.write("h.toml", "data_dir = '/of/file'");
    let named = |args: &[&str], env: &[(&str, &str)]| {
        let args = [&["token", "a"], args].concat();
        let (code, _, stderr) = run(halfway(&dir, &args).envs(env.iter().copied()));
        assert_eq!(code, 1);
        stderr.split("data directory ").nth(1).unwrap().split(':').next().unwrap().to_owned()
    };
    let (state, own) = (("STATE_DIRECTORY", "/of/systemd:/more"), ("HALFWAY_DATA_DIR", "/of/environment"));
    assert_eq!(named(&[], &[]), "./halfway-data");
    assert_eq!(named(&[], &[state]), "/of/systemd");
    assert_eq!(named(&["--config", "h.toml"], &[state]), "/of/file");
    assert_eq!(named(&["--config", "h.toml"], &[state, own]), "/of/environment");
    assert_eq!(named(&["--config", "h.toml", "--data-dir", "/of/flag"], &[state, own]), "/of/flag");
}

#[test]
fn every_flag_has_a_variable_and_an_empty_one_says_nothing() {
    let dir = instance();
    let token = |variables: &[(&str, &str)]| {
        run(halfway(&dir, &["token", "agent-7"]).envs(variables.iter().copied())).0
    };
    assert_eq!(token(&[("HALFWAY_TTL", ""), ("HALFWAY_ROOM", ""), ("HALFWAY_SCOPE", "")]), 0);
    assert_eq!(token(&[("HALFWAY_TTL", "soon")]), 2);
    let doctor = run(halfway(&dir, &["doctor"]).env("HALFWAY_LOCAL", "1").env("HALFWAY_JSON", "yes"));
    assert!(doctor.1.starts_with('{'), "{doctor:?}");
    assert_eq!(run(halfway(&dir, &["doctor"]).env("HALFWAY_LOCAL", "0")).0, 2, "there is no URL");
    let (code, _, stderr) =
        run(halfway(&dir, &["bench", "turn", "turn:127.0.0.1:9"]).env("HALFWAY_CLIENTS", "x"));
    assert!(code == 2 && stderr.contains("--clients"), "{stderr}");
}

#[test]
fn lists_in_the_environment_are_separated_by_commas() {
    let dir = instance();
    let mut command = halfway(&dir, &["ice"]);
    command
        .env("HALFWAY_TURN_LISTEN", "127.0.0.1:5000,127.0.0.1:6000")
        .env("HALFWAY_PUBLIC_IP", " 192.0.2.1, 192.0.2.2");
    assert_eq!(ice(&mut command)["uris"].as_array().unwrap().len(), 4, "UDP and TCP at both");
    let (code, _, stderr) = run(halfway(&dir, &["check"]).env("HALFWAY_ALLOW_PEER", "10.0.0.0/8,x"));
    assert_eq!(code, 78);
    assert!(stderr.starts_with(r#"HALFWAY_ALLOW_PEER: "x" is not a CIDR"#), "{stderr}");
}
