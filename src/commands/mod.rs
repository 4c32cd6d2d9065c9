//! One file for each command; `serve` is `app`.

use std::{
    env,
    fmt::{self, Write as _},
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{
    Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand,
    builder::FalseyValueParser, parser::ValueSource,
};

use crate::{
    app, clock,
    config::{self, Config, File, Overrides, Place, Problem, Surroundings},
    data_dir::DataDirError,
    host::Host,
    logging,
};

mod bench; // load, and what it costs
mod check; // says every problem of a configuration
mod doctor; // examines a server from here, or this host
mod ice; // prints the ICE list offline
pub mod quick_start; // what a terminal sees once `serve` is ready
mod token; // prints an agent's token

/// Where the configuration is looked for when nobody says.
const DEFAULT_CONFIG: &str = "/etc/halfway/halfway.toml";

#[derive(Parser)]
#[command(
    name = "halfway",
    version,
    about = "One public host where WebRTC agents meet: TURN relay, ICE credentials, signaling.",
    after_help = "Every flag can be given as HALFWAY_<FLAG> in the environment, lists separated by commas.\n\
                  Precedence: flag, environment, file, default."
)]
struct CommandLine {
    /// Configuration file [default: /etc/halfway/halfway.toml if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the secret and the self-signed certificate live [default: $STATE_DIRECTORY, else ./halfway-data]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the appliance; works with no configuration at all
    Serve(Settings),
    /// Print an agent's token
    Token(token::Options),
    /// Print the ICE servers of an agent, as /v1/ice answers them
    Ice(ice::Options),
    /// Examine a server from where an agent stands, or with --local this host
    Doctor(doctor::Options),
    /// Put a server under load, and say what that costs it
    Bench(bench::Options),
    /// Read a configuration and say every problem in it
    Check(Settings),
}

/// The settings that are flags too. Their values are read by [`overrides`], which knows where each came from.
#[derive(Args)]
struct Settings {
    /// The name in ICE URLs [default: the public address]
    #[arg(long, value_name = "NAME")]
    public_host: Option<String>,
    /// What peers see (repeatable) [default: the addresses of the default routes]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    public_ip: Vec<String>,
    /// HTTPS and WSS (repeatable) [default: [::]:8443]
    #[arg(long, value_name = "ADDR", value_delimiter = ',')]
    http_listen: Vec<String>,
    /// STUN and TURN (repeatable) [default: [::]:3478]
    #[arg(long, value_name = "ADDR", value_delimiter = ',')]
    turn_listen: Vec<String>,
    /// Ports that relay [default: 49152-65535]
    #[arg(long, value_name = "A-B")]
    relay_ports: Option<String>,
    /// Peers that may be reached although they are private (repeatable)
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    allow_peer: Vec<String>,
    /// What is logged, such as "info" or "info,halfway=debug" [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// How long agents have to leave when it is told to stop [default: 30s]
    #[arg(long, value_name = "TIME")]
    drain_timeout: Option<String>,
    /// How long allocations live on when another version has taken over [default: 1h]
    #[arg(long, value_name = "TIME")]
    upgrade_timeout: Option<String>,
}

/// Flags, by the key of the same setting in the file.
const FLAGS: [(&str, &str); 10] = [
    ("data_dir", "data_dir"),
    ("public_host", "public_host"),
    ("public_ip", "public_ips"),
    ("http_listen", "http.listen"),
    ("turn_listen", "turn.listen"),
    ("relay_ports", "turn.relay_ports"),
    ("allow_peer", "turn.allow_peers"),
    ("log", "log.filter"),
    ("drain_timeout", "drain_timeout"),
    ("upgrade_timeout", "upgrade_timeout"),
];

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let matches = with_environment(CommandLine::command()).get_matches();
    let line = CommandLine::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let done = run(&line, &matches);
    done.map_or_else(|failure| failure.report(), |()| ExitCode::SUCCESS)
}

/// Gives every flag its variable, if that says something: what is empty says nothing, nor does a "no" to what is off anyway.
fn with_environment(command: clap::Command) -> clap::Command {
    let flag = |flag: Arg| {
        let Some(variable) = flag.get_long().map(variable) else { return flag };
        let said = env::var_os(&variable).unwrap_or_default().to_string_lossy().to_lowercase();
        let is_switch = matches!(flag.get_action(), ArgAction::SetTrue);
        match said.as_str() {
            "" => flag,
            "0" | "no" | "off" | "false" if is_switch => flag,
            _ if is_switch => flag.env(variable).hide_env(true).value_parser(FalseyValueParser::new()),
            _ => flag.env(variable).hide_env(true),
        }
    };
    command.mut_args(flag).mut_subcommands(with_environment)
}

fn variable(flag: &str) -> String {
    format!("HALFWAY_{}", flag.replace('-', "_").to_uppercase())
}

fn run(line: &CommandLine, matches: &ArgMatches) -> Result<(), Failure> {
    let file = config_file(line.config.as_deref());
    if let Command::Check(_) = line.command {
        return check::run(file.as_deref(), || resolve(file.as_deref(), matches));
    }
    let config = resolve(file.as_deref(), matches)?;
    match &line.command {
        Command::Serve(_) => {
            let log = logging::start(&config.log);
            // The default file may have come, or gone, since the start.
            let reread = || resolve(config_file(line.config.as_deref()).as_deref(), matches);
            let reread =
                || reread().map_err(|failure| failure.to_string().lines().map(str::to_owned).collect());
            app::serve(config, &log, &reread).map_err(Failure::Failed)
        }
        Command::Token(options) => token::run(options, &config, clock::now()),
        Command::Ice(options) => ice::run(options, &config, clock::now()),
        Command::Doctor(options) => doctor::run(options, &config),
        Command::Bench(options) => bench::run(options, &config),
        Command::Check(_) => Ok(()),
    }
}

fn config_file(given: Option<&Path>) -> Option<PathBuf> {
    given.map(Path::to_owned).or_else(|| Some(PathBuf::from(DEFAULT_CONFIG)).filter(|path| path.exists()))
}

fn resolve(file: Option<&Path>, matches: &ArgMatches) -> Result<Config, Failure> {
    let (overrides, around) = (overrides(matches), surroundings()?);
    match file.map(File::read).transpose() {
        Ok(file) => config::resolve(file, overrides, &around).map_err(Failure::Config),
        Err(mut problems) => {
            // What flags say is wrong or right whatever the file says.
            problems.extend(config::resolve(None, overrides, &around).err().into_iter().flatten());
            Err(Failure::Config(problems))
        }
    }
}

fn surroundings() -> Result<Surroundings, Failure> {
    let host = host()?;
    // systemd gives several separated by colons when a unit names several.
    let state = env::var("STATE_DIRECTORY").ok();
    let state = state.as_deref().and_then(|list| list.split(':').next()).filter(|first| !first.is_empty());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(Surroundings { ipv6: host.ipv6, cores, state_directory: state.map(PathBuf::from) })
}

fn host() -> Result<Host, Failure> {
    Host::look().map_err(|error| Failure::Failed(format!("cannot list this host's addresses: {error}")))
}

/// What flags and environment say. Global flags stand before the command or after it.
fn overrides(matches: &ArgMatches) -> Overrides {
    let command = matches.subcommand().map(|(_, matches)| matches);
    let mut overrides = Overrides::default();
    for (id, key) in FLAGS {
        for matches in std::iter::once(matches).chain(command) {
            if let Some((place, texts)) = given(matches, id) {
                overrides.set(key, place, texts);
            }
        }
    }
    overrides
}

fn given(matches: &ArgMatches, id: &str) -> Option<(Place, Vec<String>)> {
    matches.try_contains_id(id).ok().filter(|given| *given)?;
    let flag = id.replace('_', "-");
    let place = match matches.value_source(id)? {
        ValueSource::CommandLine => Place::Flag(format!("--{flag}")),
        ValueSource::EnvVariable => Place::Environment(variable(&flag)),
        _ => return None,
    };
    Some((place, matches.get_many::<String>(id)?.map(|text| text.trim().to_owned()).collect()))
}

/// Why a command ends without success. Its report is for people; its exit code is for scripts.
enum Failure {
    Config(Vec<Problem>),
    /// A flag's value that only shows to be wrong beside the configuration.
    Usage(String),
    Failed(String),
}

impl Failure {
    fn report(&self) -> ExitCode {
        // Nothing is left to do when even this cannot be said.
        let _ = write!(io::stderr(), "{self}");
        ExitCode::from(match self {
            Self::Config(_) => 78, // EX_CONFIG of sysexits.h
            Self::Usage(_) => 2,   // as clap's own
            Self::Failed(_) => 1,
        })
    }
}

impl From<DataDirError> for Failure {
    fn from(error: DataDirError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(problems) => problems.iter().try_for_each(|problem| writeln!(f, "{problem}")),
            Self::Usage(what) | Self::Failed(what) => writeln!(f, "halfway: {what}"),
        }
    }
}

/// The result of a command, alone on stdout.
fn print(result: &str) -> Result<(), Failure> {
    let mut line = String::new();
    writeln!(line, "{result}").expect("writing to a string cannot fail");
    io::stdout()
        .write_all(line.as_bytes())
        .map_err(|error| Failure::Failed(format!("cannot write the result: {error}")))
}
