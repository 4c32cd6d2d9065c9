//! What a terminal sees once `serve` is ready.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
};

/// What there is to say.
#[derive(Clone, Debug)]
pub struct QuickStart<'a> {
    /// `host:port` of HTTPS and WSS; an IPv6 address is bracketed.
    pub https: &'a str,
    /// The URLs of the ICE list.
    pub ice_urls: &'a [String],
    /// Good for an hour. Secret.
    pub token: &'a str,
    /// Whose token that is.
    pub agent: &'a str,
    /// The self-signed certificate; `None` when everybody trusts ours.
    pub self_signed: Option<&'a Path>,
}

impl QuickStart<'_> {
    /// Prints it to stdout, if that is a terminal: tokens do not belong in logs and pipes.
    pub fn print_on_terminal(&self) {
        let mut stdout = io::stdout();
        if stdout.is_terminal() {
            // A terminal that has gone is no reason to stop.
            stdout.write_all(self.text().as_bytes()).ok();
        }
    }

    /// The whole text.
    #[must_use]
    pub fn text(&self) -> String {
        let Self { https, token, agent, .. } = self;
        let trust =
            self.self_signed.map(|path| format!(" --cacert {}", shell_word(path))).unwrap_or_default();
        let mut lines = vec![
            String::new(),
            "Halfway is ready.".to_owned(),
            String::new(),
            format!("  HTTPS       https://{https}"),
            format!("  WebSocket   wss://{https}/v1/ws"),
        ];
        lines.extend(self.ice_urls.iter().map(|url| format!("  ICE         {url}")));
        lines.extend([
            String::new(),
            format!("A token for one hour, for the agent `{agent}`:"),
            String::new(),
            format!("  {token}"),
            String::new(),
            "Its ICE servers:".to_owned(),
            String::new(),
            format!("  curl{trust} -H 'Authorization: Bearer {token}' https://{https}/v1/ice"),
            String::new(),
            "More tokens: halfway token AGENT".to_owned(),
            String::new(),
        ]);
        lines.join("\n") + "\n"
    }
}

/// Quoted where a shell would take it apart.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |char: char| char.is_ascii_alphanumeric() || "/._-+:@".contains(char);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::QuickStart;

    fn quick_start(self_signed: Option<&Path>) -> String {
        let ice_urls = ["stun:203.0.113.5:3478".to_owned()];
        let https = "203.0.113.5:8443";
        QuickStart { https, ice_urls: &ice_urls, token: "e.y.J", agent: "agent-1", self_signed }.text()
    }

    #[test]
    fn it_says_what_to_do_next() {
        let text = quick_start(None);
        for line in [
            "  HTTPS       https://203.0.113.5:8443",
            "  WebSocket   wss://203.0.113.5:8443/v1/ws",
            "  ICE         stun:203.0.113.5:3478",
            "  e.y.J",
            "  curl -H 'Authorization: Bearer e.y.J' https://203.0.113.5:8443/v1/ice",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_self_signed_certificate_is_trusted_by_name() {
        assert!(
            quick_start(Some(Path::new("/var/lib/h/cert.pem")))
                .contains("curl --cacert /var/lib/h/cert.pem -H")
        );
        assert!(quick_start(Some(Path::new("/a b/it's"))).contains(r"curl --cacert '/a b/it'\''s' -H"));
    }
}
