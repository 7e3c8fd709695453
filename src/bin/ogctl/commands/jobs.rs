//! `ogctl jobs`: prompts in progress, and cancelling one.

use super::now_us;
use crate::bus::Bus;
use crate::details::Read as _;
use crate::errors::Stop;
use crate::output::Output;
use crate::render::{Table, cell, span, tone_of_state};
use crate::term;
use opengateway::api::names::{ErrorName, JOB_INTERFACE};
use opengateway::api::path::job_path;
use serde::Serialize;
use std::time::Duration;

#[derive(Debug, Serialize)]
struct Jobs {
    jobs: Vec<Job>,
}

#[derive(Debug, Serialize)]
struct Job {
    id: u64,
    path: String,
    cluster: String,
    state: String,
    uid: Option<u64>,
    created_at: Option<u64>,
    /// Prompts before it, while it waits and the serving node says so.
    position: Option<u64>,
    /// Once it was taken up.
    model: Option<String>,
    served_by: Option<String>,
    completion_tokens: Option<u64>,
}

/// Lists them.
pub async fn list(bus: &mut Bus, out: &Output) -> Result<(), Stop> {
    let jobs = bus.ask(async |manager| manager.list_jobs().await).await?;
    let job = |(id, path, details): (u64, zbus::OwnedObjectPath, opengateway::api::proxy::Details)| Job {
        id,
        path: path.as_str().to_owned(),
        cluster: details.text_or_empty("ClusterId"),
        state: details.text_or_empty("State"),
        uid: details.number("Uid"),
        created_at: details.number("CreatedAt"),
        position: details.number("Position"),
        model: details.text("Model"),
        served_by: details.text("ServedByName").filter(|name| !name.is_empty()).or_else(|| details.text("ServedBy")),
        completion_tokens: details.number("CompletionTokens"),
    };
    out.view(Jobs { jobs: jobs.into_iter().map(job).collect() }, |view, style| {
        if view.jobs.is_empty() {
            return "No prompts in progress.\n".into();
        }
        let mut table = Table::new(&["ID", "CLUSTER", "STATE", "MODEL", "NODE", "TOKENS", "UID", "AGE"]);
        for job in &view.jobs {
            let age = job.created_at.map(|at| span(Duration::from_micros(now_us().saturating_sub(at))));
            table.row(vec![
                cell(job.id.to_string()),
                cell(term::line(&job.cluster)),
                (state(job), tone_of_state(&job.state)),
                cell(job.model.as_deref().map_or_else(|| "-".into(), term::line)),
                cell(job.served_by.as_deref().map_or_else(|| "-".into(), term::line)),
                cell(job.completion_tokens.map_or_else(|| "-".into(), |tokens| tokens.to_string())),
                cell(job.uid.map_or_else(|| "-".into(), |uid| uid.to_string())),
                cell(age.unwrap_or_else(|| "-".into())),
            ]);
        }
        table.render(style)
    })
}

/// "queued, 3 before it".
fn state(job: &Job) -> String {
    let place = job.position.map_or_else(String::new, |position| format!(", {position} before it"));
    format!("{}{place}", term::line(&job.state))
}

#[derive(Debug, Serialize)]
struct Cancelled {
    cancelled: u64,
}

/// Cancels the job `id`; one that has ended already is no failure while the daemon still knows it.
pub async fn cancel(bus: &mut Bus, out: &Output, id: u64) -> Result<(), Stop> {
    // A reading call first: it finds the bus that has the daemon, and does not start one.
    bus.ask(async |manager| manager.list_jobs().await).await?;
    let cancelled = bus.change_at::<_, ()>(&job_path(id), JOB_INTERFACE, "Cancel", &()).await;
    cancelled.map_err(|mut failure| {
        if failure.name == ErrorName::UnknownObject.short() {
            failure.message = format!("there is no job {id}");
        }
        failure
    })?;
    out.view(Cancelled { cancelled: id }, |view, _| format!("Cancelled job {}.\n", view.cancelled))
}
