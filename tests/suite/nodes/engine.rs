//! A NATS server of the tests' own, and fronts that are nodes through it. It wants `nats-server`.

use std::{
    fs,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use halfway::{
    cluster::Cluster,
    config::{self, NatsServer},
    http::Front,
    signaling::nodes::NodeId,
};
use serde_json::Value;
use tokio::{task::JoinHandle, time::timeout};

pub const NODES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(20);

/// A server, which ends with it.
pub struct Engine {
    process: Child,
    pub url: String,
}

impl Engine {
    pub fn start() -> Self {
        let directory =
            std::env::temp_dir().join(format!("halfway-nats-{}-{:p}", std::process::id(), &PATIENCE));
        let directory =
            directory.with_extension(std::thread::current().name().unwrap_or("test").replace(':', "-"));
        fs::create_dir_all(&directory).unwrap();
        let mut command = Command::new("nats-server");
        command.args(["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir"]).arg(&directory);
        let process = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn();
        let process = process.expect("nats-server is installed (tests/run does that)");
        let file = directory.join(format!("nats-server_{}.ports", process.id()));
        let url = loop {
            let ports = fs::read(&file).ok().and_then(|ports| serde_json::from_slice::<Value>(&ports).ok());
            if let Some(url) = ports.as_ref().and_then(|ports| ports["nats"][0].as_str()) {
                break url.to_owned();
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let _ = fs::remove_dir_all(&directory);
        Self { process, url }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Fronts that know each other.
pub struct Among {
    _engine: Engine,
    passing_on: Vec<JoinHandle<()>>,
}

impl Among {
    pub async fn join(engine: Engine, fronts: Vec<Arc<Front>>) -> Self {
        let mut passing_on = Vec::new();
        for (place, front) in fronts.iter().enumerate() {
            // High parts that differ, as random ones do.
            let node = NodeId((place as u64 + 1) << 40);
            let name = format!("node-{place}");
            front.join_cluster(node, &name);
            let address = engine.url.parse().unwrap();
            let nats = vec![NatsServer { address, login: None }];
            let config = config::Cluster { nats, node: Some(name), ca: None, credentials: None };
            let cluster = Cluster::start(&config, Arc::clone(front), node).await.unwrap();
            passing_on.push(tokio::spawn(cluster.run()));
        }
        let know_each_other = async {
            while fronts.iter().any(|front| front.counters().nodes.nodes + 1 < fronts.len()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, know_each_other).await.expect("nodes that know each other");
        Self { _engine: engine, passing_on }
    }
}

impl Drop for Among {
    fn drop(&mut self) {
        self.passing_on.iter().for_each(JoinHandle::abort);
    }
}
