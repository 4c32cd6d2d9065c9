//! What changes while it runs: SIGHUP reads the configuration again, and nothing that lives is touched.

use std::sync::Arc;

use super::{Keys, Reread, certificates::Keeping, connections_at_most};
use crate::{
    config::Config,
    credentials::signaled::Signaled,
    door::Door,
    http::{Front, ice::IceOffer},
    logging,
    relay::Relay,
    systemd,
    turn::{server::Rules, strangers::Strangers},
};

/// Everything that goes by the configuration, and the one that it goes by.
pub(super) struct Live {
    /// What is taken at a start alone goes by this one for good.
    pub(super) started: Config,
    pub(super) config: Config,
    pub(super) keys: Keys,
    pub(super) keeping: Keeping,
    /// The first port of HTTPS.
    pub(super) https: u16,
    pub(super) offer: IceOffer,
    pub(super) strangers: Strangers,
    /// What agents tell each other of their addresses, if anybody wants to know.
    pub(super) signaled: Signaled,
    pub(super) relay: Arc<Relay>,
    pub(super) door: Arc<Door>,
    pub(super) front: Arc<Front>,
}

impl Live {
    /// Goes by what the configuration says now; by what it said before if anything is wrong with it.
    pub(super) fn reload(&mut self, log: &logging::Filter, reread: Reread<'_>) {
        systemd::reloading();
        match reread() {
            Ok(config) => match self.keys.reload(&self.config, &config) {
                Ok(()) => self.adopt(config, log),
                Err(problem) => refuse(&[problem]),
            },
            Err(problems) => refuse(&problems),
        }
        systemd::ready();
    }

    fn adopt(&mut self, new: Config, log: &logging::Filter) {
        for key in self.started.differs_for_good(&new) {
            tracing::warn!("{key} is taken at a start alone: restart for what the configuration says now");
        }
        log.adopt(&new.log);
        if new.turn.unauthenticated_per_second != self.config.turn.unauthenticated_per_second {
            self.strangers = Strangers::new(new.turn.unauthenticated_per_second);
        }
        self.relay.adopt(&self.rules(&new), new.turn.quotas());
        self.door.adopt(&new.http, connections_at_most());
        self.keeping.reload(&self.config, &new);
        self.offer = IceOffer {
            public_host: new.public_host.clone(),
            default_ttl: new.credentials.ttl,
            max_ttl: new.credentials.max_ttl,
            ..self.offer.clone()
        };
        self.config = new;
        self.follow_certificate();
        tracing::info!("the configuration is reloaded");
    }

    /// ICE lists name `turns:` once clients can trust its certificate.
    pub(super) fn follow_certificate(&mut self) {
        self.offer.turns_port = (!self.keeping.is_self_signed()).then_some(self.https);
        self.front.adopt(
            self.keys.terms(&self.config, &self.offer, &self.signaled),
            self.config.signaling.limits(),
        );
    }

    fn rules(&self, new: &Config) -> Rules {
        Rules {
            secrets: self.keys.turn.clone(),
            allow: new.turn.allow_peers.clone(),
            deny: new.turn.deny_peers.clone(),
            denied: new.turn.denied_peers,
            signaled: new.turn.signaled(&self.signaled),
            strangers: self.strangers.clone(),
        }
    }
}

fn refuse(problems: &[String]) {
    for problem in problems {
        tracing::warn!("the configuration is not reloaded, and nothing has changed: {problem}");
    }
}
