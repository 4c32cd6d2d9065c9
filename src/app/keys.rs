//! What the instance keeps secret, and whom it trusts.

use std::{convert::Infallible, sync::Arc};

use tokio::task::JoinHandle;

use crate::{
    config::{Config, Outside},
    credentials::{
        issuer::Issuer, keyring::InstanceSecret, revocations::Revocations, signaled::Signaled,
        token::TokenKeys, turn_rest::TurnSecrets,
    },
    data_dir::DataDir,
    http::{Terms, ice::IceOffer},
    jwks::Jwks,
    revoking,
};

/// All that says who may use us.
pub(super) struct Keys {
    pub(super) instance: InstanceSecret,
    pub(super) turn: TurnSecrets,
    pub(super) tokens: TokenKeys,
    pub(super) revocations: Revocations,
    jwks: Option<Arc<Jwks>>,
    /// Follows what the issuer shows.
    following: Option<JoinHandle<()>>,
}

impl Keys {
    /// # Errors
    /// One line for people.
    pub(super) fn of(config: &Config) -> Result<Self, String> {
        let data_dir = DataDir::new(&config.data_dir);
        let instance = data_dir.secret_or_new().map_err(|error| error.to_string())?;
        let revocations = Revocations::default();
        revoking::recall(&revocations, &data_dir)?;
        let jwks = open(config)?;
        let turn = turn_secrets(config, &instance);
        let tokens = tokens(config, &instance, jwks.as_deref(), &revocations);
        Ok(Self { instance, turn, tokens, revocations, jwks, following: None })
    }

    /// Adds what the data dir says by now of who was revoked.
    ///
    /// # Errors
    /// One line for people.
    pub(super) fn recall(&self, config: &Config) -> Result<(), String> {
        revoking::recall(&self.revocations, &DataDir::new(&config.data_dir))
    }

    /// Follows the keys of the outside issuer from now on, if there is one.
    pub(super) fn follow(&mut self) {
        if let Some(before) = self.following.take() {
            before.abort();
        }
        self.following = self.jwks.clone().map(|jwks| tokio::spawn(jwks.follow()));
    }

    /// Goes by what the configuration says now. Who holds an allocation goes on with the password of a secret that is there no
    /// more.
    ///
    /// # Errors
    /// One line for people; nothing has changed then.
    pub(super) fn reload(&mut self, old: &Config, new: &Config) -> Result<(), String> {
        if new.auth.outside != old.auth.outside {
            self.jwks = open(new)?;
            self.follow();
        }
        if new.credentials.secrets != old.credentials.secrets {
            self.turn = turn_secrets(new, &self.instance).in_place_of(&self.turn);
        }
        self.tokens = tokens(new, &self.instance, self.jwks.as_deref(), &self.revocations);
        Ok(())
    }

    /// What requests are answered by.
    pub(super) fn terms(&self, config: &Config, offer: &IceOffer, signaled: &Signaled) -> Terms {
        let (tokens, turn, jwks) = (self.tokens.clone(), self.turn.clone(), self.jwks.clone());
        Terms::new(config, tokens, turn, offer.clone(), jwks, signaled)
    }
}

fn open(config: &Config) -> Result<Option<Arc<Jwks>>, String> {
    let open = |outside: &Outside| Jwks::open(outside.jwks.clone(), DataDir::new(&config.data_dir));
    config.auth.outside.as_ref().map(open).transpose()
}

fn turn_secrets(config: &Config, instance: &InstanceSecret) -> TurnSecrets {
    let Ok(turn) = config.credentials.turn_secrets(|| Ok::<_, Infallible>(instance.clone()));
    turn
}

/// Our own keys, and those of the outside issuer.
fn tokens(
    config: &Config,
    instance: &InstanceSecret,
    jwks: Option<&Jwks>,
    revocations: &Revocations,
) -> TokenKeys {
    let Ok(own) = config.auth.token_keys(|| Ok::<_, Infallible>(instance.clone()));
    let issuer = config.auth.outside.as_ref().zip(jwks).map(|(outside, jwks)| Issuer {
        keys: jwks.keys(),
        issuer: outside.issuer.clone(),
        audience: outside.audience.clone(),
    });
    own.with_issuer(issuer).with_revocations(revocations.clone())
}
