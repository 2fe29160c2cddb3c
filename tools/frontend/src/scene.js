// A dashboard's JSON as a scene: its variables, annotations and grid; each panel with its queries.
import {
  DataSourceVariable, EmbeddedScene, QueryVariable, SceneControlsSpacer, SceneDataLayerSet, SceneDataTransformer,
  SceneGridItem, SceneGridLayout, SceneGridRow, SceneQueryRunner, SceneTimePicker, SceneTimeRange, SceneVariableSet,
  VariableValueSelectors, VizPanel, dataLayers,
} from '@grafana/scenes';

/** `chosen` gives the values of a variable, as a list, or none. */
function variable(model, chosen) {
  const common = { name: model.name, label: model.label, hide: model.hide };
  if (model.type === 'datasource') {
    return new DataSourceVariable({ ...common, pluginId: model.query, value: 'prometheus', text: 'Prometheus' });
  }
  if (model.type !== 'query') {
    throw new Error(`a variable of the type ${model.type} is not drawn here: add it to tools/frontend/src/scene.js`);
  }
  const values = chosen.length ? chosen : [model.current?.value ?? ''].flat();
  const value = model.multi ? values : values[0];
  return new QueryVariable({
    ...common, query: model.query, datasource: model.datasource, refresh: model.refresh, sort: model.sort,
    regex: model.regex ?? '', isMulti: model.multi, includeAll: model.includeAll, allValue: model.allValue, value, text: value,
  });
}

function panel(model, place = model.gridPos) {
  const queries = new SceneQueryRunner({ datasource: model.datasource, queries: model.targets, minInterval: model.interval });
  const { x, y, w, h } = place;
  return new SceneGridItem({
    x, y, width: w, height: h,
    body: new VizPanel({
      key: `panel-${model.id}`, title: model.title, description: model.description, pluginId: model.type,
      options: model.options ?? {}, fieldConfig: model.fieldConfig,
      $data: model.transformations?.length
        ? new SceneDataTransformer({ $data: queries, transformations: model.transformations })
        : queries,
    }),
  });
}

/** Panels under the row that stands above them; `rows` are the titles of those to draw, all if there are none. */
function grid(panels, rows) {
  const children = [];
  let shown = !rows.length;
  let top = 0; // of what comes next: rows that are left out leave no gap
  let above = 0;
  for (const model of panels) {
    if (model.type === 'row') {
      shown = !rows.length || rows.includes(model.title);
      above = model.gridPos.y - top;
    }
    if (!shown) {
      continue;
    }
    const place = { ...model.gridPos, y: model.gridPos.y - above };
    top = Math.max(top, place.y + place.h);
    children.push(
      model.type === 'row'
        ? new SceneGridRow({ title: model.title, y: place.y, isCollapsible: false, children: [] })
        : panel(model, place),
    );
  }
  return new SceneGridLayout({ isDraggable: false, isLazy: false, children });
}

/** These panels alone, side by side. */
function line(panels, titles) {
  const chosen = titles.map((title) => panels.find((model) => model.title === title));
  const w = 24 / titles.length;
  const children = chosen.map((model, i) => panel(model, { x: i * w, y: 0, w, h: model.gridPos.h }));
  return new SceneGridLayout({ isDraggable: false, isLazy: false, children });
}

/** Milliseconds as scenes take them; "now-1h" as it is. */
const moment = (text) => (/^\d+$/.test(text) ? new Date(Number(text)).toISOString() : text);

/** The dashboard over a time ("now-1h", or milliseconds), with what is chosen for its variables. */
export function scene(model, { from, to, chosen, rows, panels }) {
  const marks = model.annotations.list.filter((query) => !query.builtIn);
  return new EmbeddedScene({
    $timeRange: new SceneTimeRange({ from: moment(from), to: moment(to), timeZone: 'utc' }),
    $variables: new SceneVariableSet({ variables: model.templating.list.map((one) => variable(one, chosen(one.name))) }),
    $data: new SceneDataLayerSet({
      layers: marks.map((query) => new dataLayers.AnnotationsDataLayer({ name: query.name, query, isEnabled: query.enable })),
    }),
    controls: [new VariableValueSelectors({}), new SceneControlsSpacer(), new SceneTimePicker({ isOnCanvas: true })],
    body: panels.length ? line(model.panels, panels) : grid(model.panels, rows),
  });
}
