//! s2n-quic's side.

use anyhow::Context;
use s2n_quic::client::Connect;
use s2n_quic::provider::tls::default as tls;
use s2n_quic::stream::BidirectionalStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{ALPN, Get, Serve, destination, requested};

/// Stream error code for a file that does not exist.
const NOT_FOUND: u32 = 4;

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("tokio runtime")
}

fn any(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}

pub(crate) fn get(get: &Get) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let ca = std::fs::read_to_string(&get.ca).context("--ca")?;
        let tls = tls::Client::builder()
            .with_certificate(ca.as_str())
            .map_err(any)?
            .with_application_protocols([ALPN].iter())
            .map_err(any)?
            .build()
            .map_err(any)?;
        let mut client =
            s2n_quic::Client::builder().with_tls(tls)?.with_io("[::]:0")?.start().map_err(any)?;
        let target = Connect::new(std::net::SocketAddr::from(get.connect))
            .with_server_name(get.server_name.as_str());
        let mut connection = client.connect(target).await.context("connecting")?;
        for path in &get.paths {
            let stream = connection.open_bidirectional_stream().await.context("opening")?;
            let (mut receive, mut send) = stream.split();
            send.write_all(format!("GET {path}\r\n").as_bytes()).await?;
            send.finish()?;
            let mut file = std::fs::File::create(destination(&get.out, path))?;
            while let Some(chunk) =
                receive.receive().await.with_context(|| format!("receiving {path}"))?
            {
                std::io::Write::write_all(&mut file, &chunk)?;
            }
        }
        connection.close(0u32.into());
        client.wait_idle().await.map_err(any)
    })
}

pub(crate) fn serve(serve: &Serve) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let tls = tls::Server::builder()
            .with_certificate(serve.cert.as_path(), serve.key.as_path())
            .map_err(any)?
            .with_application_protocols([ALPN].iter())
            .map_err(any)?
            .build()
            .map_err(any)?;
        let mut server = s2n_quic::Server::builder()
            .with_tls(tls)?
            .with_io(std::net::SocketAddr::from(serve.listen))?
            .start()
            .map_err(any)?;
        println!("listening");
        while let Some(mut connection) = server.accept().await {
            let www = serve.www.clone();
            tokio::spawn(async move {
                // The end of a connection ends its task, whatever the reason.
                while let Ok(Some(stream)) = connection.accept_bidirectional_stream().await {
                    let www = www.clone();
                    tokio::spawn(async move {
                        if let Err(error) = answer(stream, &www).await {
                            eprintln!("stream: {error:#}");
                        }
                    });
                }
            });
        }
        Ok(())
    })
}

async fn answer(mut stream: BidirectionalStream, www: &std::path::Path) -> anyhow::Result<()> {
    let mut request = Vec::new();
    stream.read_to_end(&mut request).await?;
    let file = requested(&request).map(|path| std::fs::read(www.join(path)));
    let Some(Ok(file)) = file else {
        stream.reset(NOT_FOUND.into())?;
        return Ok(());
    };
    stream.write_all(&file).await?;
    stream.finish()?;
    Ok(())
}
