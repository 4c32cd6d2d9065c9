//! What changes while it runs: SIGHUP reads the configuration again, and nothing that lives is touched.

use std::sync::Arc;

use super::{Keys, Reread, certificates::Keeping, connections_at_most, shared_secrets};
use crate::{
    config::Config,
    door::Door,
    http::{Front, Terms, ice::IceOffer},
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
    pub(super) relay: Arc<Relay>,
    pub(super) door: Arc<Door>,
    pub(super) front: Arc<Front>,
}

impl Live {
    /// Goes by what the configuration says now; by what it said before if anything is wrong with it.
    pub(super) fn reload(&mut self, log: &logging::Filter, reread: Reread<'_>) {
        systemd::reloading();
        match reread() {
            Ok(config) => self.adopt(config, log),
            Err(problems) => {
                for problem in problems {
                    tracing::warn!("the configuration is not reloaded, and nothing has changed: {problem}");
                }
            }
        }
        systemd::ready();
    }

    fn adopt(&mut self, new: Config, log: &logging::Filter) {
        for key in self.started.differs_for_good(&new) {
            tracing::warn!("{key} is taken at a start alone: restart for what the configuration says now");
        }
        log.adopt(&new.log);
        self.take_secrets(&new);
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
        let Keys { tokens, turn, .. } = &self.keys;
        let terms = Terms::new(&self.config, tokens.clone(), turn.clone(), self.offer.clone());
        self.front.adopt(terms, self.config.signaling.limits());
    }

    /// Who holds an allocation goes on with the password of a secret that is there no more.
    fn take_secrets(&mut self, new: &Config) {
        let (turn, tokens) = shared_secrets(new, &self.keys.instance);
        if new.credentials.secrets != self.config.credentials.secrets {
            self.keys.turn = turn.in_place_of(&self.keys.turn);
        }
        self.keys.tokens = tokens;
    }

    fn rules(&self, new: &Config) -> Rules {
        Rules {
            secrets: self.keys.turn.clone(),
            allow: new.turn.allow_peers.clone(),
            deny: new.turn.deny_peers.clone(),
            denied: new.turn.denied_peers,
            strangers: self.strangers.clone(),
        }
    }
}
