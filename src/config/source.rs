//! Where a setting comes from (flag, environment, file), and what is wrong with it, by place.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::{Range, RangeInclusive},
    path::{Path, PathBuf},
    sync::Arc,
};

use toml::de::{DeTable, DeValue};

/// Reads settings by their keys in the file (`http.listen`), remembers which exist, and collects every problem.
pub(super) struct Reader {
    file: Option<File>,
    overrides: Overrides,
    known: BTreeSet<&'static str>,
    problems: Vec<Problem>,
}

impl Reader {
    pub(super) fn new(file: Option<File>, overrides: Overrides) -> Self {
        Self { file, overrides, known: BTreeSet::new(), problems: Vec::new() }
    }

    /// A setting that is one string.
    pub(super) fn text<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let given = match self.given(key)? {
            Given::Override(place, texts) => Located { place, value: Value::Text(texts.join(",")) },
            Given::File(located) => located,
        };
        let Value::Text(text) = given.value else {
            return self.refuse(given.place, key, "must be a string, in quotes".to_owned());
        };
        parse(&text).map_or_else(|what| self.refuse(given.place, key, what), Some)
    }

    /// A setting that no file has.
    pub(super) fn flag_only<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let (place, texts) = self.overrides.0.get(key)?.clone();
        parse(&texts.join(",")).map_or_else(|what| self.refuse(place, key, what), Some)
    }

    /// A setting that is a list of strings. A bad entry is a problem of its own line.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let (_, entries) = self.entries(key)?;
        Some(entries.into_iter().filter_map(|entry| self.entry(key, entry, &parse)).collect())
    }

    /// A list that makes no sense without an entry.
    pub(super) fn filled_list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let (place, entries) = self.entries(key)?;
        if entries.is_empty() {
            return self.refuse(place, key, "needs one entry at least".to_owned());
        }
        Some(entries.into_iter().filter_map(|entry| self.entry(key, entry, &parse)).collect())
    }

    fn entries(&mut self, key: &'static str) -> Option<(Place, Vec<Located>)> {
        match self.given(key)? {
            Given::Override(place, texts) => {
                let entries = texts.into_iter().map(|text| Located::text(&place, text)).collect();
                Some((place, entries))
            }
            Given::File(Located { place, value: Value::List(entries) }) => Some((place, entries)),
            Given::File(other) => self.refuse(other.place, key, LIST.to_owned()),
        }
    }

    fn entry<T>(
        &mut self,
        key: &str,
        entry: Located,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        match entry.value {
            Value::Text(text) => parse(&text).map_or_else(|what| self.refuse(entry.place, key, what), Some),
            _ => self.refuse(entry.place, key, LIST.to_owned()),
        }
    }

    /// A setting that is a whole number within `range`.
    pub(super) fn number(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Option<i64> {
        let given = self.file_only(key)?;
        match given.value {
            Value::Number(number) if range.contains(&number) => Some(number),
            _ => {
                let what = format!("must be a whole number from {} to {}", range.start(), range.end());
                self.refuse(given.place, key, what)
            }
        }
    }

    /// A setting that is on or off.
    pub(super) fn switch(&mut self, key: &'static str) -> Option<bool> {
        let given = self.file_only(key)?;
        match given.value {
            Value::Boolean(on) => Some(on),
            _ => self.refuse(given.place, key, "must be true or false".to_owned()),
        }
    }

    fn file_only(&mut self, key: &'static str) -> Option<Located> {
        match self.given(key)? {
            Given::File(located) => Some(located),
            Given::Override(..) => unreachable!("no flag is a number"),
        }
    }

    /// A problem of `key` as a whole, found by comparing it with others.
    pub(super) fn problem(&mut self, key: &'static str, what: impl Into<String>) {
        let place = match self.given(key) {
            Some(Given::Override(place, _)) => place,
            Some(Given::File(located)) => located.place,
            None => Place::Default,
        };
        self.refuse::<()>(place, key, what.into());
    }

    fn refuse<T>(&mut self, place: Place, key: &str, what: String) -> Option<T> {
        self.problems.push(Problem { place, key: key.to_owned(), what });
        None
    }

    /// The first of flag, environment and file that says something.
    fn given(&mut self, key: &'static str) -> Option<Given> {
        self.known.insert(key);
        if let Some((place, texts)) = self.overrides.0.get(key) {
            return Some(Given::Override(place.clone(), texts.clone()));
        }
        self.file.as_ref()?.entries.get(key).cloned().map(Given::File)
    }

    /// Every problem, in the order of the lines; call it when everything has been read.
    pub(super) fn finish(mut self) -> Vec<Problem> {
        self.find_unknown();
        self.problems.sort_by_key(|problem| problem.place.line());
        self.problems
    }

    fn find_unknown(&mut self) {
        let mut unknown_tables: Vec<String> = Vec::new();
        for (key, entry) in self.file.iter().flat_map(|file| &file.entries) {
            let inside = unknown_tables.iter().any(|table| key.starts_with(table));
            if inside || self.known.contains(key.as_str()) {
                continue;
            }
            let prefix = format!("{key}.");
            let is_table = self.known.iter().any(|known| known.starts_with(&prefix));
            let what = match (is_table, &entry.value) {
                (true, Value::Table) => continue,
                (true, _) => format!("must be a table: [{key}]"),
                (false, _) => unknown(key, &self.known),
            };
            unknown_tables.push(prefix);
            self.problems.push(Problem { place: entry.place.clone(), key: key.clone(), what });
        }
    }
}

const LIST: &str = r#"must be a list of strings, such as ["a", "b"]"#;

/// The usual mistake is a key in the wrong table, or of the right name elsewhere.
fn unknown(key: &str, known: &BTreeSet<&str>) -> String {
    let last = |key: &str| key.rsplit('.').next().map(str::to_owned);
    let elsewhere: Vec<_> =
        known.iter().filter(|known| last(known) == last(key)).map(|known| format!("`{known}`")).collect();
    if elsewhere.is_empty() {
        "unknown key".to_owned()
    } else {
        format!("unknown key; did you mean {}?", elsewhere.join(" or "))
    }
}

/// What flags and environment say, by the key in the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides(BTreeMap<&'static str, (Place, Vec<String>)>);

impl Overrides {
    /// What was given at `place`. An empty variable says nothing.
    pub fn set(&mut self, key: &'static str, place: Place, texts: Vec<String>) {
        let texts: Vec<_> = texts.into_iter().filter(|text| !text.is_empty()).collect();
        if !texts.is_empty() {
            self.0.insert(key, (place, texts));
        }
    }
}

enum Given {
    Override(Place, Vec<String>),
    File(Located),
}

/// A configuration file, taken apart into its keys.
#[derive(Debug)]
pub struct File {
    entries: BTreeMap<String, Located>,
}

impl File {
    /// Reads it.
    ///
    /// # Errors
    /// When it cannot be read, or is not TOML.
    pub fn read(path: &Path) -> Result<Self, Vec<Problem>> {
        let text = std::fs::read_to_string(path).map_err(|error| vec![Problem::of_file(path, &error)])?;
        Self::parse(path, &text)
    }

    /// Takes `text` apart; `path` is for the problems.
    ///
    /// # Errors
    /// When it is not TOML: every mistake with its line.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Vec<Problem>> {
        let lines = Lines { path: path.into(), text };
        let (root, errors) = DeTable::parse_recoverable(text);
        if errors.is_empty() {
            let mut entries = BTreeMap::new();
            lines.collect(String::new(), root.get_ref(), &mut entries);
            return Ok(Self { entries });
        }
        let mut problems: Vec<_> = errors.iter().map(|error| lines.problem(error)).collect();
        problems.sort_by_key(|problem| problem.place.line());
        problems.dedup_by_key(|problem| problem.place.line());
        Err(problems)
    }
}

/// Turns offsets into lines.
struct Lines<'a> {
    path: Arc<Path>,
    text: &'a str,
}

impl Lines<'_> {
    fn collect(&self, prefix: String, table: &DeTable<'_>, entries: &mut BTreeMap<String, Located>) {
        for (name, value) in table {
            let key = join(&prefix, name.get_ref());
            entries.insert(key.clone(), self.located(&name.span(), value.get_ref()));
            if let DeValue::Table(inner) = value.get_ref() {
                self.collect(key, inner, entries);
            }
        }
    }

    fn located(&self, span: &Range<usize>, value: &DeValue<'_>) -> Located {
        let value = match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => {
                i64::from_str_radix(number.as_str(), number.radix()).map_or(Value::Other, Value::Number)
            }
            DeValue::Boolean(yes) => Value::Boolean(*yes),
            DeValue::Array(list) => {
                Value::List(list.iter().map(|entry| self.located(&entry.span(), entry.get_ref())).collect())
            }
            DeValue::Table(_) => Value::Table,
            DeValue::Float(_) | DeValue::Datetime(_) => Value::Other,
        };
        Located { place: self.place(span.start), value }
    }

    fn place(&self, offset: usize) -> Place {
        let before = self.text.as_bytes().get(..offset).unwrap_or(self.text.as_bytes());
        Place::File {
            path: self.path.clone(),
            line: 1 + before.iter().filter(|&&byte| byte == b'\n').count(),
        }
    }

    fn problem(&self, error: &toml::de::Error) -> Problem {
        let place = self.place(error.span().map_or(0, |span| span.start));
        Problem { place, key: String::new(), what: error.message().replace('\n', ", ") }
    }
}

/// A quoted name with a dot in it is one name, not two.
fn join(prefix: &str, name: &str) -> String {
    let name = if name.contains('.') { format!("{name:?}") } else { name.to_owned() };
    if prefix.is_empty() { name } else { format!("{prefix}.{name}") }
}

#[derive(Clone, Debug)]
pub(super) struct Located {
    place: Place,
    value: Value,
}

impl Located {
    fn text(place: &Place, text: String) -> Self {
        Self { place: place.clone(), value: Value::Text(text) }
    }
}

/// Where it stands does not matter to what it says.
impl PartialEq for Located {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

/// What a file says about one key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Number(i64),
    Boolean(bool),
    List(Vec<Located>),
    Table,
    /// Of a kind that no setting has.
    Other,
}

/// As it would stand in the file.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "{text:?}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Boolean(yes) => write!(f, "{yes}"),
            Self::List(_) => f.write_str("[]"),
            Self::Table | Self::Other => f.write_str("its default"),
        }
    }
}

/// Where a setting was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nobody said anything: what is wrong follows from another setting.
    Default,
    /// `--http-listen`
    Flag(String),
    /// `HALFWAY_HTTP_LISTEN`
    Environment(String),
    File {
        path: Arc<Path>,
        line: usize,
    },
    /// The file as a whole.
    WholeFile(PathBuf),
}

impl Place {
    fn line(&self) -> usize {
        if let Self::File { line, .. } = self { *line } else { 0 }
    }
}

/// One thing that is wrong, in one line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    /// In the file's words; empty when the file as a whole is wrong.
    pub key: String,
    pub what: String,
}

impl Problem {
    fn of_file(path: &Path, error: &std::io::Error) -> Self {
        Self {
            place: Place::WholeFile(path.into()),
            key: String::new(),
            what: format!("cannot be read: {error}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Default => {}
            Place::Flag(name) | Place::Environment(name) => return write!(f, "{name}: {}", self.what),
            Place::File { path, line } => write!(f, "{}:{line}: ", path.display())?,
            Place::WholeFile(path) => write!(f, "{}: ", path.display())?,
        }
        if self.key.is_empty() { f.write_str(&self.what) } else { write!(f, "{}: {}", self.key, self.what) }
    }
}
