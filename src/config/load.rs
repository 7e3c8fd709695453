//! Where the configuration comes from: files and drop-ins, the environment, the command line; later ones win.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::raw::{Cluster, Node, OneOrMany, Raw};
use super::settings::Settings;

/// A configuration file is text that a person wrote.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Where files are looked for. Parameters, so that tests have their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// The main file; absent is well unless it was asked for by name.
    pub main: PathBuf,
    /// `main` was named on the command line.
    pub main_required: bool,
    /// Directories of drop-ins, the weakest first.
    pub drop_ins: Vec<PathBuf>,
    /// State directory when nothing names one.
    pub state_dir: PathBuf,
    /// Models when nothing names their directory nor that of the state; `None` is "models" in the state directory.
    pub models_dir: Option<PathBuf>,
    /// Directories that models are found in besides, when nothing names them.
    pub models_also: Vec<PathBuf>,
}

impl Roots {
    /// Of a system-wide installation.
    pub fn system() -> Self {
        let drop_in = |root: &str| PathBuf::from(root).join("opengateway/opengatewayd.toml.d");
        Self {
            main: "/etc/opengateway/opengatewayd.toml".into(),
            main_required: false,
            drop_ins: vec![drop_in("/usr/lib"), drop_in("/run"), drop_in("/etc")],
            state_dir: "/var/lib/opengateway".into(),
            models_dir: None,
            models_also: vec!["/usr/share/opengateway/models".into()],
        }
    }

    /// Of a per-user installation below `root`.
    pub fn per_user(root: &Path) -> Self {
        Self {
            main: root.join("config/opengatewayd.toml"),
            main_required: false,
            drop_ins: vec![root.join("config/opengatewayd.toml.d")],
            state_dir: root.join("state"),
            models_dir: Some(root.join("models")),
            models_also: vec![root.join("share/opengateway/models")],
        }
    }

    /// With `main` as the only main file, and the drop-ins beside it.
    #[must_use]
    pub fn with_main(self, main: PathBuf) -> Self {
        let mut beside = main.clone().into_os_string();
        beside.push(".d");
        Self { main, main_required: true, drop_ins: vec![beside.into()], ..self }
    }
}

/// The environment that the daemon reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment(HashMap<String, String>);

impl Environment {
    /// Of this process.
    pub fn of_process() -> Self {
        Self(
            [
                "NODE_NAME",
                "POC_CLUSTER_ID",
                "POC_SERVE",
                "OPENGATEWAY_BOOTSTRAP",
                "OPENGATEWAY_POC_ROOT",
                "CREDENTIALS_DIRECTORY",
            ]
            .into_iter()
            .filter_map(|key| std::env::var(key).ok().filter(|value| !value.is_empty()).map(|value| (key.to_owned(), value)))
            .collect(),
        )
    }

    /// Of these pairs.
    pub fn new<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// The root of a per-user installation.
    pub fn per_user_root(&self) -> Option<PathBuf> {
        self.0.get("OPENGATEWAY_POC_ROOT").map(PathBuf::from)
    }

    fn apply(&self, raw: &mut Raw) -> Result<(), ConfigError> {
        let bad = |key: &str, reason: String| ConfigError::Value { place: format!("environment variable {key}"), reason };
        if let Some(name) = self.0.get("NODE_NAME") {
            raw.node.get_or_insert_with(Node::default).name = Some(name.clone());
        }
        let serve = match self.0.get("POC_SERVE").map(String::as_str) {
            None => None,
            Some("1" | "true" | "yes") => Some(true),
            Some("0" | "false" | "no") => Some(false),
            Some(other) => return Err(bad("POC_SERVE", format!("{other:?} is neither 1 nor 0"))),
        };
        if let Some(serve) = serve {
            raw.serve.get_or_insert_default().enabled = Some(serve);
        }
        if let Some(id) = self.0.get("POC_CLUSTER_ID") {
            let clusters = raw.cluster.get_or_insert_default();
            if !clusters.iter().any(|cluster| cluster.id.eq_ignore_ascii_case(id)) {
                clusters.push(Cluster { id: id.clone(), serve, bootstrap: None });
            }
        }
        if let Some(list) = self.0.get("OPENGATEWAY_BOOTSTRAP") {
            let found = list.split([',', ' ', '\n']).filter(|address| !address.is_empty()).map(str::to_owned).collect();
            raw.network.get_or_insert_default().bootstrap = Some(found);
        }
        raw.credentials = self.0.get("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        Ok(())
    }
}

/// The command line of the daemon; it wins over everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// `--node-name`.
    pub node_name: Option<String>,
    /// `--serve` or `--consume`.
    pub serve: Option<bool>,
    /// `--listen`.
    pub listen: Vec<String>,
    /// `--bootstrap`.
    pub bootstrap: Vec<String>,
    /// `--connect`.
    pub connect: Vec<String>,
    /// `--no-mdns`.
    pub no_mdns: bool,
    /// `--no-discover`.
    pub no_discover: bool,
    /// `--http`.
    pub http: Vec<String>,
    /// `--log`.
    pub log: Option<String>,
}

impl Overrides {
    fn apply(&self, raw: &mut Raw) {
        let node = raw.node.get_or_insert_default();
        node.state_dir = self.state_dir.clone().or(node.state_dir.take());
        node.name = self.node_name.clone().or(node.name.take());
        let network = raw.network.get_or_insert_default();
        if !self.listen.is_empty() {
            network.listen = Some(self.listen.clone());
        }
        if !self.bootstrap.is_empty() {
            network.bootstrap = Some(self.bootstrap.clone());
        }
        if self.no_mdns {
            network.mdns = Some(false);
        }
        if self.no_discover {
            raw.upstreams.get_or_insert_default().discover = Some(false);
        }
        if self.serve.is_some() {
            raw.serve.get_or_insert_default().enabled = self.serve;
            for cluster in raw.cluster.iter_mut().flatten() {
                cluster.serve = self.serve;
            }
        }
        for id in &self.connect {
            let clusters = raw.cluster.get_or_insert_default();
            if !clusters.iter().any(|cluster| cluster.id.eq_ignore_ascii_case(id)) {
                clusters.push(Cluster { id: id.clone(), serve: self.serve, bootstrap: None });
            }
        }
        if !self.http.is_empty() {
            raw.http.get_or_insert_default().listen = Some(OneOrMany::Many(self.http.clone()));
        }
        if self.log.is_some() {
            raw.log.get_or_insert_default().level.clone_from(&self.log);
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is larger than any configuration.
    #[error("{0}: larger than {limit} bytes", limit = MAX_FILE_BYTES)]
    TooLarge(PathBuf),
    /// A mistake at a place in a file.
    #[error("{path}:{line}:{column}: {reason}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong, with what was probably meant.
        reason: String,
    },
    /// A value that is out of range.
    #[error("{place}: {reason}")]
    Value {
        /// Where it comes from.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

/// A configuration that was read.
#[derive(Debug)]
pub struct Checked {
    /// In force.
    pub settings: Settings,
    /// The files it comes from, the weakest first.
    pub files: Vec<PathBuf>,
}

fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..text.floor_char_boundary(at)];
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

/// serde says "unknown field `x`, expected one of `y`, `z`": add which one was probably meant.
fn with_guess(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let (Some(unknown), true) = (quoted.next(), message.contains("unknown field")) else {
        return message.trim_end().to_owned();
    };
    let nearest = quoted.min_by_key(|known| distance(unknown, known));
    match nearest.filter(|known| distance(unknown, known) <= 3) {
        Some(known) => format!("unknown key {unknown:?}; did you mean {known:?}?"),
        None => format!("unknown key {unknown:?}"),
    }
}

fn read(path: &Path) -> Result<Option<Raw>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    match fs::metadata(path) {
        Ok(found) if found.len() > MAX_FILE_BYTES => return Err(ConfigError::TooLarge(path.to_owned())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    let raw: Raw = toml::from_str(&text).map_err(|error| {
        let (line, column) = line_and_column(&text, error.span().map_or(0, |span| span.start));
        ConfigError::Syntax { path: path.to_owned(), line, column, reason: with_guess(error.message()) }
    })?;
    // Ranges are checked file by file, so that the file is named; the merged whole is checked again.
    Settings::check(raw.clone(), "host", PathBuf::new())
        .map_err(|reason| ConfigError::Value { place: path.display().to_string(), reason })?;
    Ok(Some(raw))
}

/// Drop-ins by name: one in a stronger directory replaces its namesake in a weaker one.
fn drop_ins(directories: &[PathBuf]) -> Result<Vec<PathBuf>, ConfigError> {
    let mut by_name = BTreeMap::new();
    for directory in directories {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ConfigError::Unreadable { path: directory.clone(), source }),
        };
        for entry in entries {
            let entry = entry.map_err(|source| ConfigError::Unreadable { path: directory.clone(), source })?;
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                by_name.insert(entry.file_name(), path);
            }
        }
    }
    Ok(by_name.into_values().collect())
}

/// Reads, merges and checks everything, as the daemon does.
///
/// # Errors
/// [`ConfigError`], naming file, line and reason.
pub fn check(roots: &Roots, environment: &Environment, overrides: &Overrides) -> Result<Checked, ConfigError> {
    let mut raw = Raw::default();
    let mut files = Vec::new();
    match read(&roots.main)? {
        Some(main) => {
            raw.merge(main);
            files.push(roots.main.clone());
        }
        None if roots.main_required => {
            let source = io::Error::new(io::ErrorKind::NotFound, "there is no such file");
            return Err(ConfigError::Unreadable { path: roots.main.clone(), source });
        }
        None => {}
    }
    for path in drop_ins(&roots.drop_ins)? {
        if let Some(over) = read(&path)? {
            raw.merge(over);
            files.push(path);
        }
    }
    environment.apply(&mut raw)?;
    overrides.apply(&mut raw);
    let elsewhere = raw.node.as_ref().is_some_and(|node| node.state_dir.is_some());
    if let (Some(models), false) = (&roots.models_dir, elsewhere) {
        raw.models.get_or_insert_default().directory.get_or_insert_with(|| models.clone());
    }
    raw.models.get_or_insert_default().also.get_or_insert_with(|| roots.models_also.clone());
    let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let settings = Settings::check(raw, &hostname, roots.state_dir.clone())
        .map_err(|reason| ConfigError::Value { place: "command line, environment or files".to_owned(), reason })?;
    Ok(Checked { settings, files })
}

/// [`check`], for those who want the settings alone.
///
/// # Errors
/// [`ConfigError`].
pub fn load(roots: &Roots, environment: &Environment, overrides: &Overrides) -> Result<Settings, ConfigError> {
    check(roots, environment, overrides).map(|checked| checked.settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn roots(directory: &Path) -> Roots {
        Roots {
            main: directory.join("main.toml"),
            main_required: false,
            drop_ins: vec![directory.join("lib"), directory.join("run"), directory.join("etc")],
            state_dir: directory.join("state"),
            models_dir: None,
            models_also: Vec::new(),
        }
    }

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn name(roots: &Roots, environment: &Environment, overrides: &Overrides) -> String {
        load(roots, environment, overrides).unwrap().node_name
    }

    #[test]
    fn a_per_user_installation_has_its_models_beside_its_state() {
        let root = tempfile::tempdir().unwrap();
        let models = |text: &str, overrides: &Overrides| {
            write(root.path().join("config/opengatewayd.toml"), text);
            load(&Roots::per_user(root.path()), &Environment::default(), overrides).unwrap().models_dir
        };
        let none = Overrides::default();
        assert_eq!(models("", &none), root.path().join("models"));
        assert_eq!(models("[models]\ndirectory = \"/m\"", &none), Path::new("/m"));
        let elsewhere = Overrides { state_dir: Some("/s".into()), ..Overrides::default() };
        assert_eq!(models("", &elsewhere), Path::new("/s/models"));
    }

    #[test]
    fn the_command_line_wins_over_the_environment_and_that_over_files() {
        let directory = tempfile::tempdir().unwrap();
        let roots = roots(directory.path());
        let (nothing, none) = (Environment::default(), Overrides::default());
        write(roots.main.clone(), "[node]\nname = \"main\"");
        assert_eq!(name(&roots, &nothing, &none), "main");
        write(directory.path().join("lib/50-a.toml"), "[node]\nname = \"lib\"");
        assert_eq!(name(&roots, &nothing, &none), "lib");
        write(directory.path().join("run/40-b.toml"), "[node]\nname = \"run\"");
        assert_eq!(name(&roots, &nothing, &none), "lib", "names decide the order, not directories");
        write(directory.path().join("etc/50-a.toml"), "[node]\nname = \"etc\"");
        assert_eq!(name(&roots, &nothing, &none), "etc", "a namesake in a stronger directory replaces");
        let environment = Environment::new([("NODE_NAME", "env")]);
        assert_eq!(name(&roots, &environment, &none), "env");
        let overrides = Overrides { node_name: Some("line".to_owned()), ..none };
        assert_eq!(name(&roots, &environment, &overrides), "line");
    }

    #[test]
    fn a_typo_is_refused_with_file_line_and_guess() {
        let directory = tempfile::tempdir().unwrap();
        let roots = roots(directory.path());
        write(roots.main.clone(), "[network]\nmdns = true\n\nboostrap = []\n");
        let error = load(&roots, &Environment::default(), &Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("main.toml:4:1:") && error.contains("did you mean \"bootstrap\""), "{error}");
        write(roots.main.clone(), "[node]\nname = 3\n");
        let error = load(&roots, &Environment::default(), &Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("main.toml:2:8:"), "{error}");
        write(roots.main.clone(), "[node\n");
        assert!(load(&roots, &Environment::default(), &Overrides::default()).is_err());
    }

    #[test]
    fn a_value_out_of_range_names_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let roots = roots(directory.path());
        write(directory.path().join("etc/10-x.toml"), "[network]\nmax_connections = 1");
        let error = load(&roots, &Environment::default(), &Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("10-x.toml"), "{error}");
    }

    #[test]
    fn the_environment_of_the_document_works() {
        let directory = tempfile::tempdir().unwrap();
        let environment = Environment::new([
            ("POC_CLUSTER_ID", "home"),
            ("POC_SERVE", "0"),
            ("OPENGATEWAY_BOOTSTRAP", "/ip4/192.0.2.1/tcp/4001, /ip4/192.0.2.2/tcp/4001"),
        ]);
        let settings = load(&roots(directory.path()), &environment, &Overrides::default()).unwrap();
        assert!(!settings.serve && settings.clusters[0].serve != Some(true));
        assert_eq!((settings.clusters[0].id.as_str(), settings.bootstrap.len()), ("home", 2));
        let bad = Environment::new([("POC_SERVE", "maybe")]);
        assert!(load(&roots(directory.path()), &bad, &Overrides::default()).is_err());
    }

    #[test]
    fn a_main_file_that_was_asked_for_must_be_there() {
        let directory = tempfile::tempdir().unwrap();
        let roots = roots(directory.path()).with_main(directory.path().join("none.toml"));
        assert!(load(&roots, &Environment::default(), &Overrides::default()).is_err());
    }

    #[test]
    fn serve_on_the_command_line_counts_for_every_configured_cluster() {
        let directory = tempfile::tempdir().unwrap();
        let roots = roots(directory.path());
        write(roots.main.clone(), "[[cluster]]\nid = \"a\"\nserve = true");
        let overrides = Overrides { serve: Some(false), connect: vec!["b".to_owned(), "A".to_owned()], ..Overrides::default() };
        let settings = load(&roots, &Environment::default(), &overrides).unwrap();
        assert_eq!(settings.clusters.len(), 2);
        assert!(settings.clusters.iter().all(|cluster| cluster.serve == Some(false)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_text_makes_the_reader_panic_and_every_error_names_the_file(
            text in prop_oneof![".{0,80}", "(\\[\\[?(node|network|serve|cluster|backend|lög)\\]?\\]\n|(name|cores|id|kind|listen|mdns) = (1|-1|nan|true|\"x\"|\\[\"/ä\"\\])\n){0,6}"],
        ) {
            let directory = tempfile::tempdir().unwrap();
            let roots = roots(directory.path());
            write(roots.main.clone(), &text);
            if let Err(error) = load(&roots, &Environment::default(), &Overrides::default()) {
                prop_assert!(error.to_string().contains("main.toml"), "{error}");
            }
        }

        #[test]
        fn a_place_in_a_text_is_within_it(text in "(ä|x|\n|\r\n){0,20}", at in 0_usize..60) {
            let (line, column) = line_and_column(&text, at);
            prop_assert!(line >= 1 && line <= text.matches('\n').count() + 1);
            prop_assert!(column >= 1 && column <= text.chars().count() + 1);
        }

        #[test]
        fn a_distance_is_symmetric_and_zero_for_the_same(a in "[a-cä]{0,8}", b in "[a-cä]{0,8}") {
            prop_assert_eq!(distance(&a, &b), distance(&b, &a));
            prop_assert_eq!(distance(&a, &b) == 0, a == b);
            prop_assert!(distance(&a, &b) <= a.chars().count().max(b.chars().count()));
        }
    }
}
