//! `broker-http token`: bearer tokens for identities.

use std::io::Read as _;
use std::process::ExitCode;

use broker_http::{Identity, Token, TokenHash};

use crate::output::{fail, print, say, show};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a token: it is printed once, and what the daemon keeps of it beside
    New {
        /// What the identity is called in the lines for the configuration
        #[arg(long, default_value = "NAME")]
        name: String,
    },
    /// Print what the daemon keeps of a token, which is read from standard input
    Hash,
}

/// Characters of a token that are not soon guessed.
const SHORTEST: usize = 16;

pub(crate) fn run(command: Command) -> ExitCode {
    match command {
        Command::New { name } => match Identity::new(&name).and_then(|_| Token::random()) {
            Ok(token) => {
                // The token alone on standard output: a script keeps it, a person sees both.
                print(&format!("{}\n", token.expose()));
                show(&format!(
                    "\nThe token is above, for whoever will use it; it is shown this once. The daemon's configuration\nkeeps only its hash:\n\n[[identities]]\nname = \"{name}\"\ntokens = [\"{}\"]\nallow = [{{ actions = [\"publish\"], topics = [\">\"] }}]\n",
                    token.hash()
                ));
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error),
        },
        Command::Hash => {
            let mut text = String::new();
            if let Err(error) = std::io::stdin().take(4096).read_to_string(&mut text) {
                say!("broker-http: standard input cannot be read: {error}");
                return ExitCode::FAILURE;
            }
            let token = text.trim_end_matches(['\r', '\n']);
            if token.len() < SHORTEST {
                say!(
                    "broker-http: a token of {SHORTEST} characters or more is expected on standard input, since a short one can be guessed; `broker-http token new` makes a good one"
                );
                return ExitCode::from(2);
            }
            print(&format!("{}\n", TokenHash::of(token)));
            ExitCode::SUCCESS
        }
    }
}
