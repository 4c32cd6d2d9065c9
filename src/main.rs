//! Flags → configuration → run → exit code.

fn main() -> std::process::ExitCode {
    halfway::commands::main()
}
