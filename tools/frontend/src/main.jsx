// Draws one dashboard; the address says which, from where and when:
//   ?dashboard=optimizer&prometheus=http://127.0.0.1:9090&scrape=15s&from=now-1h&to=now&theme=light&var-run=x
//   &row=Overview (only these rows) &panel=Loss (only these panels, side by side)
// `document.body.dataset.state` is "done" when every panel has its data, or "failed".
import './boot';

import { EventBusSrv, LoadingState, ThemeContext, createTheme } from '@grafana/data';
import {
  LocationServiceProvider, config, locationService, setAppEvents, setDataSourceSrv, setPluginImportUtils, setRunRequest, toDataQueryError,
} from '@grafana/runtime';
import { VizPanel, sceneGraph } from '@grafana/scenes';
import { GlobalStyles, PortalContainer } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import { Router } from 'react-router-dom';
import { catchError, map, of, startWith } from 'rxjs';

import { register } from './plugins';
import { Prometheus } from './prometheus';
import { scene } from './scene';

const address = new URLSearchParams(location.search);
const given = (name, otherwise) => address.get(name) ?? otherwise;

/** The only data source there is, whatever its name. */
function provideData() {
  const settings = { uid: 'prometheus', name: 'Prometheus', type: 'prometheus', meta: { id: 'prometheus', info: {} }, jsonData: {} };
  const source = new Prometheus(settings, given('prometheus'), given('scrape', '15s'));
  setDataSourceSrv({
    get: async () => source,
    getList: () => [settings],
    getInstanceSettings: () => settings,
    reload: () => {},
    registerRuntimeDataSource: () => {},
  });
  setRunRequest((datasource, request) => {
    const made = (state, more = {}) => ({ state, series: [], annotations: [], timeRange: request.range, request, ...more });
    return datasource.query(request).pipe(
      map(({ data }) => made(LoadingState.Done, { series: data })),
      catchError((error) => of(made(LoadingState.Error, { error: toDataQueryError(error), errors: [toDataQueryError(error)] }))),
      startWith(made(LoadingState.Loading)),
    );
  });
}

/** Pixels that the grid takes, below the controls: Grafana's rows are 30 high, 8 apart. */
function heightOf(root) {
  const ends = root.state.body.state.children.map(({ state }) => (state.y ?? 0) + (state.height ?? 1));
  return 100 + 38 * Math.max(...ends);
}

/** Every panel is there, with its data: said in the page, for whoever waits for it. */
function tell(root) {
  const waiting = setInterval(() => {
    const panels = sceneGraph.findAllObjects(root, (one) => one instanceof VizPanel);
    const states = panels.map((one) => sceneGraph.getData(one).state.data?.state);
    const drawn = document.querySelectorAll('[data-viz-panel-key] [data-testid="data-testid panel content"]').length;
    if (drawn === panels.length && states.every((state) => state === LoadingState.Done || state === LoadingState.Error)) {
      clearInterval(waiting);
      setTimeout(() => (document.body.dataset.state = 'done'), 500); // the last of them are drawn meanwhile
    }
  }, 100);
}

async function main() {
  config.theme2 = createTheme({ colors: { mode: window.grafanaBootData.user.theme } });
  setAppEvents(new EventBusSrv());
  provideData();
  setPluginImportUtils({ importPanelPlugin: async () => undefined, getPanelPluginFromCache: () => undefined });
  register();
  const model = await (await fetch(`dashboards/${given('dashboard')}.json`)).json();
  const root = scene(model, {
    from: given('from', model.time.from),
    to: given('to', model.time.to),
    chosen: (name) => address.getAll(`var-${name}`),
    rows: address.getAll('row'),
    panels: address.getAll('panel'),
  });
  createRoot(document.getElementById('root')).render(
    <ThemeContext.Provider value={config.theme2}>
      <GlobalStyles />
      <LocationServiceProvider service={locationService}>
        <Router navigator={locationService.getHistory()} location={locationService.getLocation()}>
          <h1>{model.title}</h1>
          <div style={{ display: 'flex', flexDirection: 'column', height: heightOf(root) }}>
            <root.Component model={root} />
          </div>
        </Router>
      </LocationServiceProvider>
      <PortalContainer />
    </ThemeContext.Provider>,
  );
  tell(root);
}

main().catch((error) => {
  console.error(error);
  document.body.dataset.state = 'failed';
  document.body.append(String(error));
});
