//! The start of both programs: options, configuration, threads, runtime. Also their end.
//!
//! The order is the same in both: options, `--health`, configuration, `--print-config` and `--check-config`, threads, runtime; then the
//! program's own `run`: log, signals, listeners.

use crate::{health_check::health_check, log, threads};
use castier_config::{Config, Loaded, LogFormat, Problems, load_offline_with, load_with};
use rustix::fs::Mode;
use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

/// The options of both programs.
#[derive(Clone, Debug, clap::Args)]
pub struct CommonArgs {
    /// The configuration file (TOML). Without it: the defaults and the environment.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check the configuration, name every problem, and exit: 0 if it is sound, 2 if not.
    #[arg(long)]
    pub check_config: bool,
    /// With --check-config: look at no directory, file or secret of this machine.
    #[arg(long, requires = "check_config")]
    pub offline: bool,
    /// With --check-config: also ask the origin whether it can be reached, and whether it lets this program do what it needs, within 10 s.
    #[arg(long, requires = "check_config", conflicts_with = "offline")]
    pub online: bool,
    /// Ask this URL, such as http://127.0.0.1:8082/healthz, and exit: 0 if it answers with 2xx, 1 if not.
    #[arg(long, value_name = "URL")]
    pub health: Option<String>,
    /// Print the effective configuration, secrets masked, and exit.
    #[arg(long)]
    pub print_config: bool,
}

impl CommonArgs {
    /// Loads the configuration from the file that `--config` names. `environment` overrides the file, and a later pair overrides an earlier one.
    ///
    /// # Errors
    /// All problems of the configuration.
    pub fn load<C: Config>(&self, environment: impl Iterator<Item = (String, String)>) -> Result<Loaded<C>, Problems> {
        self.load_with(environment, |_, _| {})
    }

    /// The same, with checks of the program's own: see [`castier_config::load_with`].
    ///
    /// # Errors
    /// All problems of the configuration.
    pub fn load_with<C: Config>(
        &self,
        environment: impl Iterator<Item = (String, String)>,
        check: impl FnOnce(&C, &mut Problems),
    ) -> Result<Loaded<C>, Problems> {
        let file = self.config.as_deref();
        if self.offline { load_offline_with(file, environment, check) } else { load_with(file, environment, check) }
    }
}

/// How long `--online` may take.
const ONLINE: Duration = Duration::from_secs(10);

/// Handles the options that only print or check something. Otherwise loads the configuration and runs the program. `program` is its name in records.
/// `ask` is for `--online`: it asks the origin, which `origin_key` names.
pub fn main<C: Config, A: Future<Output = Problems>, F: Future<Output = Result<(), String>>>(
    program: &'static str,
    args: &CommonArgs,
    load: impl FnOnce() -> Result<Loaded<C>, Problems>,
    (origin_key, ask): (&str, impl FnOnce(C) -> A),
    run: impl FnOnce(C) -> F,
) -> ExitCode {
    let fail = |format, why: &str| {
        log::fail(format, program, why);
        ExitCode::FAILURE
    };
    if let Some(url) = &args.health {
        return health_check(url).map_or_else(|why| fail(LogFormat::Text, &why), |()| ExitCode::SUCCESS);
    }
    // What a cache keeps is for nobody else on this machine: directories get 0700 and files 0600.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let (config, notes) = match load() {
        Ok(loaded) => (loaded.config, loaded.notes),
        Err(problems) => {
            if args.check_config || args.print_config {
                eprintln!("{problems}");
            } else {
                problems.to_string().lines().for_each(|problem| log::fail(problems.format(), program, problem));
            }
            return ExitCode::from(2);
        }
    };
    if args.print_config {
        say(castier_config::print(&config).trim_end());
        return ExitCode::SUCCESS;
    }
    if args.check_config {
        // On stderr, as problems are: stdout has the verdict.
        notes.iter().for_each(|note| eprintln!("note: {note}"));
    }
    if args.check_config && !args.online {
        say("the configuration is sound");
        return ExitCode::SUCCESS;
    }
    let format = config.log().format;
    if let Err(why) = threads::check() {
        return fail(format, &why);
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(format, &format!("no threads to run on: {error}")),
    };
    if args.check_config {
        let problems = runtime.block_on(async { tokio::time::timeout(ONLINE, ask(config)).await }).unwrap_or_else(|_| {
            let mut problems = Problems::default();
            problems.add(
                origin_key,
                format!("has not answered everything within {} s; is it up, and can this machine reach it?", ONLINE.as_secs()),
            );
            problems
        });
        runtime.shutdown_timeout(Duration::from_millis(100));
        if problems.is_empty() {
            say("the configuration is sound, and the origin answers");
            return ExitCode::SUCCESS;
        }
        eprintln!("{problems}");
        return ExitCode::from(2);
    }
    let ended = runtime.block_on(run(config));
    // Do not wait for tasks that have not ended within shutdown.grace.
    runtime.shutdown_timeout(Duration::from_millis(100));
    ended.map_or_else(|why| fail(format, &why), |()| ExitCode::SUCCESS)
}

/// Writes lines to stdout. A closed stdout must not end the program.
fn say(lines: &str) {
    writeln!(io::stdout(), "{lines}").ok();
}
